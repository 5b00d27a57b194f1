"""Calibration sets on disk: x_t with its own t beside it, in files that are streamed, never read whole.

    x.npy      float32 [N, C, H, W]      what the network is shown
    t.npy      int64 [N]                 the time step that it is told
    image.npy  int64 [N]                 which trajectory (or training image) the sample is of
    x_0.npy    float32 [images, C, H, W] where each trajectory ended (or the training image)
    groups.npy uint8                     which groups of trajectories are finished
    about.json                           fingerprint and parts

A set is made once under its fingerprint and shared by every run that asks for the same one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdq_exp.runtime import files, stage


class CalibrationSet:
    """Args:
        folder: of the files.
        samples: N.
        images: number of trajectories.
        shape: (C, H, W) of a sample.
        groups: number of groups that are made (and resumed) at a time.

    Raises:
        ValueError: from `read`, if the files are damaged or another set's.
    """

    def __init__(self, folder: Path, samples: int, images: int, shape: Sequence[int], groups: int) -> None:
        self.folder, self.samples, self.images = folder, samples, images
        self._files: dict[str, tuple[type, tuple[int, ...]]] = {
            "x": (np.float32, (samples, *shape)), "t": (np.int64, (samples,)), "image": (np.int64, (samples,)),
            "x_0": (np.float32, (images, *shape)), "groups": (np.uint8, (groups,)),
        }  # fmt: skip

    def create(self, parts: Mapping[str, Any]) -> None:
        """Makes the files, empty, if there are none yet.

        Raises:
            OSError: if the folder can't be written or is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, (dtype, shape) in self._files.items():
                path = self.folder / f"{name}.npy"
                if not path.exists():
                    part = path.with_suffix(".part")
                    with part.open("wb") as file:
                        np.lib.format.write_array(file, np.zeros(shape, dtype))
                    os.replace(part, path)
        except OSError as error:
            raise OSError(
                f"{self.folder}: can't be written ({error.strerror}); free space or set data.cache=FOLDER"
            ) from error
        about = {"fingerprint": files.fingerprint(parts), "parts": parts}
        files.write(self.folder / "about.json", about)

    def _open(self, name: str, mode: str = "r") -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        dtype, shape = self._files[name]
        try:
            array = np.load(path, mmap_mode=mode)  # type: ignore[arg-type]
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged; remove {self.folder} to make the set again") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path}: holds {array.dtype} {array.shape}, expected {shape}; remove {self.folder}")
        return array

    def missing(self) -> list[int]:
        """Groups that are not finished."""
        return [int(i) for i in np.flatnonzero(self._open("groups") == 0)]

    def put(self, group: int, first: int, x: Tensor, t: Tensor, image: Tensor, x_0: Tensor, first_image: int) -> None:
        """Stores a group: its samples from index `first` on, its trajectories' ends from `first_image` on."""
        values = {"x": (first, x), "t": (first, t), "image": (first, image), "x_0": (first_image, x_0)}
        for name, (start, value) in values.items():
            array = self._open(name, "r+")
            array[start : start + len(value)] = value.numpy()
            array.flush()  # type: ignore[attr-defined]
        done = self._open("groups", "r+")
        done[group] = 1
        done.flush()  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.samples

    def batch(self, index: slice | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(x, t) of some samples, copied into memory."""
        x, t = self._open("x")[index], self._open("t")[index]
        return torch.from_numpy(np.array(x)), torch.from_numpy(np.array(t))

    def times(self) -> Tensor:
        """t of every sample, `[N]`."""
        return torch.from_numpy(np.array(self._open("t")))

    def image(self) -> NDArray[np.int64]:
        """Trajectory of every sample, `[N]`."""
        return np.array(self._open("image"))

    def ends(self) -> Tensor:
        """x_0 of every trajectory, `[images, C, H, W]`."""
        return torch.from_numpy(np.array(self._open("x_0")))


def check(folder: Path, parts: Mapping[str, Any]) -> None:
    """Refuses a set of other parts: another model, schedule, sampler, seed or number.

    Raises:
        FileNotFoundError: if there is no set.
        ValueError: names up to four differences.
    """
    about = files.read(folder / "about.json")
    if about is None:
        raise FileNotFoundError(f"calibration.path={folder}: holds no calibration set (about.json is missing)")
    if about["fingerprint"] == files.fingerprint(parts):
        return
    changed = stage.differences(about["parts"], parts)
    listed = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    raise ValueError(f"{folder}: a calibration set of other parts ({listed}); leave calibration.path out to make one")
