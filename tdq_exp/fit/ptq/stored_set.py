"""A calibration set on disk, streamed, never read whole.

x.npy      float32 [N, C, H, W]       x_t
t.npy      int64 [N]                  its time step
image.npy  int64 [N]                  which trajectory (or training image) the sample is of
x_0.npy    float32 [images, C, H, W]  where each trajectory ended (or the training image)
condition.npy  [images, ...]          its condition; only where the model takes one
groups.npy uint64                     which groups of trajectories are finished, and CRC-32
about.json                            fingerprint and parts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdq_exp.data.arrays import Column, GroupedArrays
from tdq_exp.diffusion.objective import NetworkInput
from tdq_exp.runtime import files, stage


class CalibrationSet:
    """A calibration set on disk.

    Args:
        folder: of the files.
        samples: N.
        images: number of trajectories; N is a multiple of it.
        shape: (C, H, W) of a sample.
        group: trajectories that are made (and resumed) at a time.
        condition: of one trajectory, `[1, ...]`, as an example; None for an unconditional model.
        of: fingerprint of the set.

    Raises:
        ValueError: from whatever reads, if the files are damaged or another set's.
    """

    def __init__(
        self,
        folder: Path,
        samples: int,
        images: int,
        shape: Sequence[int],
        group: int,
        condition: Tensor | None = None,
        of: str = "",
    ) -> None:
        self.folder, self.samples, self.images = folder, samples, images
        each = samples // images
        columns = {
            "x": Column((samples, *shape), np.float32, group * each),
            "t": Column((samples,), np.int64, group * each),
            "image": Column((samples,), np.int64, group * each),
            "x_0": Column((images, *shape), np.float32, group),
        }
        if condition is not None:
            example = condition.numpy()
            columns["condition"] = Column((images, *example.shape[1:]), example.dtype, group)

        self.conditional = condition is not None
        self.arrays = GroupedArrays(
            folder, columns, again="make the set", elsewhere="data.cache", of=of
        )

    def create(self, parts: Mapping[str, Any]) -> None:
        """Make the files, empty, if there are none yet, and then say what they are of.

        Raises:
            OSError: if the folder can't be written or is full.
        """
        self.arrays.create()
        about = {"fingerprint": files.fingerprint(parts), "parts": parts}
        files.write_json(self.folder / "about.json", about)

    def missing(self) -> list[int]:
        """Return the groups that are not finished."""
        return self.arrays.missing()

    def __len__(self) -> int:
        return self.samples

    def batch(self, index: slice | NDArray[np.int64]) -> NetworkInput:
        """Return some samples, copied into memory, each with its trajectory's condition."""
        x, t = (np.array(self.arrays.read(name)[index]) for name in ("x", "t"))
        condition = None
        if self.conditional:
            image = self.arrays.read("image")[index]
            condition = torch.from_numpy(np.array(self.arrays.read("condition")[image]))
        return NetworkInput(torch.from_numpy(x), torch.from_numpy(t), condition)

    def times(self) -> Tensor:
        """Return t of every sample, `[N]`."""
        return torch.from_numpy(np.array(self.arrays.read("t")))

    def image(self) -> NDArray[np.int64]:
        """Return the trajectory of every sample, `[N]`."""
        return np.array(self.arrays.read("image"))


def require_set(folder: Path) -> None:
    """Refuse a folder that holds no calibration set.

    Raises:
        FileNotFoundError, ValueError: naming the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"calibration.path={folder}: is no folder of a calibration set")
    if files.read_json(folder / "about.json") is None:
        raise FileNotFoundError(
            f"calibration.path={folder}: holds no calibration set (about.json is missing)"
        )


def require_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Refuse a set of other parts: another model, schedule, sampler, seed or number.

    Raises:
        FileNotFoundError: if there is no set.
        ValueError: names up to four differences.
    """
    require_set(folder)
    about = files.read_json(folder / "about.json", needs=["fingerprint", "parts"])
    assert about is not None
    if about["fingerprint"] == files.fingerprint(parts):
        return

    changed = stage.listed(stage.differences(about["parts"], parts))
    raise ValueError(
        f"{folder}: a calibration set of other parts ({changed});"
        " leave calibration.path out to make one"
    )
