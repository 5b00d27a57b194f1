"""An array on disk that is filled a group of rows at a time, and a map of the groups that are finished.

    <name>.npy    [N, ...]
    groups.npy    uint8 [ceil(N / group)]   1: finished

Processes write disjoint groups of the same files, so nothing is merged afterwards, and what was interrupted goes on where
it stopped: a group's byte is set only after its rows are flushed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class GroupedArray:
    """Args:
        folder: of the files.
        name: of the array's file.
        shape: [N, ...].
        dtype: of the array.
        group: rows of a group; the last one may have fewer.
        again: what makes it anew, for messages: `encode`.
        elsewhere: the key that moves it, for messages: `out`.

    Raises:
        ValueError: if the files are damaged, or another array's.
        OSError: if the folder can't be written.
    """

    def __init__(
        self, folder: Path, name: str, shape: Sequence[int], dtype: DTypeLike, group: int, again: str, elsewhere: str
    ) -> None:
        self.folder, self.name, self.group, self.again, self.elsewhere = folder, name, group, again, elsewhere
        self.rows, self.groups = shape[0], -(-shape[0] // group)
        self._files = {name: (tuple(shape), np.dtype(dtype)), "groups": ((self.groups,), np.dtype(np.uint8))}

    def create(self) -> None:
        """Makes the files, empty, if there are none; one process does this before any opens them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._path(self.name).exists():
                self._path("groups").unlink(missing_ok=True)  # it speaks of an array that is gone
            for name in self._files:
                self._make(name)
        except OSError as error:
            raise OSError(
                f"{self.folder}: can't be written ({error.strerror}); free space or set {self.elsewhere}=FOLDER"
            ) from error

    def _make(self, name: str) -> None:
        path = self._path(name)
        if path.exists():
            return
        shape, dtype = self._files[name]
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # a run beside this one has its own
        try:
            with part.open("wb") as file:  # really written: a full disk is an error now, not a crash later
                np.lib.format.write_array(file, np.zeros(shape, dtype))
            if not path.exists():  # or it is the other run's by now
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Groups that are not finished."""
        return [int(i) for i in np.flatnonzero(self._open("groups") == 0)]

    def put(self, group: int, rows: NDArray[Any]) -> None:
        """Stores a group; rows past the end of the array (padding) are dropped."""
        start = group * self.group
        stop = min(start + self.group, self.rows)
        array, done = self._open(self.name, "r+"), self._open("groups", "r+")
        array[start:stop] = rows[: stop - start]
        array.flush()
        done[group] = 1
        done.flush()

    def read(self) -> NDArray[Any]:
        """The array, memory-mapped, finished or not."""
        return self._open(self.name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _open(self, name: str, mode: Any = "r") -> np.memmap[Any, Any]:
        path = self._path(name)
        try:
            array = np.load(path, mmap_mode=mode)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged; remove {self.folder} to {self.again} again") from error
        shape, dtype = self._files[name]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{path}: holds {array.dtype} {array.shape}, expected {dtype} {shape}; remove {self.folder}"
            )
        return array


class ImageStore(GroupedArray):
    """Images of one sampling run, uint8 `[N, H, W, C]`.

    Args:
        folder: holds `images.npy` and `groups.npy`.
        images: N.
        batch: images of a group.
        shape: (H, W, C).

    Raises:
        ValueError: if the files there are of another set.
        OSError: if the folder can't be written.
    """

    def __init__(self, folder: Path, images: int, batch: int, shape: tuple[int, int, int]) -> None:
        super().__init__(folder, "images", (images, *shape), np.uint8, batch, again="sample", elsewhere="out")
        self.images, self.batch = images, batch

    def read(self) -> NDArray[np.uint8]:
        """The whole set, memory-mapped.

        Raises:
            ValueError: if images are missing: fewer than asked is an error, never a number.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self.groups} groups of images are missing; "
                "run the same command again to finish them"
            )
        return super().read()
