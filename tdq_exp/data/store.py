"""A generated image set on disk: one memory-mapped uint8 array, and a bitmap of the groups that are finished.

Processes write disjoint groups of the same files, so nothing is merged afterwards and an interrupted set goes on where
it stopped. A group's byte is set only after its pixels are flushed.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class ImageStore:
    """Images of one sampling run.

    Args:
        folder: holds `images.npy` (uint8 `[N, H, W, C]`) and `groups.npy` (uint8 `[ceil(N / batch)]`).
        images: N.
        batch: images of a group.
        shape: (H, W, C).

    Raises:
        ValueError: if the files there are of another set.
        OSError: if the folder can't be written.
    """

    def __init__(self, folder: Path, images: int, batch: int, shape: tuple[int, int, int]) -> None:
        self.folder, self.images, self.batch = folder, images, batch
        self._shapes = {"images.npy": (images, *shape), "groups.npy": (-(-images // batch),)}

    def create(self) -> None:
        """Makes the files if there are none; one process does this before any opens them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, shape in self._shapes.items():
                path = self.folder / name
                if not path.exists():
                    part = path.with_suffix(".part")
                    with part.open("wb") as file:  # really written: a full disk is an error now, not a crash later
                        np.lib.format.write_array(file, np.zeros(shape, np.uint8))
                    os.replace(part, path)
        except OSError as error:
            raise OSError(
                f"{self.folder}: can't be written ({error.strerror}); free space or set out=FOLDER"
            ) from error

    def _open(self, name: str, mode: str) -> NDArray[np.uint8]:
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode=mode)  # type: ignore[arg-type]
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged; remove {self.folder} to sample again") from error
        if array.shape != self._shapes[name]:
            raise ValueError(f"{path}: holds {array.shape}, expected {self._shapes[name]}; remove {self.folder}")
        return array

    def missing(self) -> list[int]:
        """Groups that are not finished."""
        return [int(i) for i in np.flatnonzero(self._open("groups.npy", "r") == 0)]

    def put(self, group: int, pixels: NDArray[np.uint8]) -> None:
        """Stores the images of a group; those past the end of the set (padding) are dropped."""
        start = group * self.batch
        stop = min(start + self.batch, self.images)
        images = self._open("images.npy", "r+")
        images[start:stop] = pixels[: stop - start]
        images.flush()  # type: ignore[attr-defined]
        done = self._open("groups.npy", "r+")
        done[group] = 1
        done.flush()  # type: ignore[attr-defined]

    def read(self) -> NDArray[np.uint8]:
        """The whole set, memory-mapped.

        Raises:
            ValueError: if images are missing: fewer than asked is an error, never a number.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self._shapes['groups.npy'][0]} groups of images are missing; "
                "run the same command again to finish them"
            )
        return self._open("images.npy", "r")
