"""Arrays on disk that are filled a group of rows at a time, with a map of the finished groups.

    <name>.npy    [N, ...], one or several
    groups.npy    uint8 [number of groups]   1: finished

Processes write disjoint groups of the same files, so nothing is merged afterwards. An interrupted
run is continued where it stopped: a group's byte is set only after its rows are flushed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tdq_exp.runtime import files


@dataclass(frozen=True)
class Column:
    """One array of a `GroupedArrays`.

    Args:
        shape: `[N, ...]`.
        dtype: of the array.
        group: rows of a group; the last group may have fewer.
    """

    shape: Sequence[int]
    dtype: DTypeLike
    group: int

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-self.shape[0] // self.group)


class GroupedArrays:
    """Arrays in one folder that are filled together, group by group.

    Args:
        folder: of the files.
        columns: the arrays, by name; all of them have the same number of groups.
        again: what makes the arrays again, for messages: `encode`.
        elsewhere: the configuration key of the folder, for messages: `out`.

    Raises:
        ValueError: from whatever opens a file, if it is damaged or of another shape or type.
        OSError: from `create`, if the folder can't be written.
    """

    def __init__(
        self, folder: Path, columns: Mapping[str, Column], again: str, elsewhere: str
    ) -> None:
        self.folder, self.columns = folder, dict(columns)
        self.again, self.elsewhere = again, elsewhere

        (self.groups,) = {column.groups for column in self.columns.values()}
        self._files = {name: (tuple(c.shape), np.dtype(c.dtype)) for name, c in columns.items()}
        self._files["groups"] = ((self.groups,), np.dtype(np.uint8))

    def create(self) -> None:
        """Make the files, empty, if there are none; one process does this before any opens them.

        Raises:
            OSError: naming the folder, if it can't be written or is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)

            # A map without its arrays describes arrays that are gone.
            if not all(self._path(name).exists() for name in self.columns):
                self._path("groups").unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.folder}: can't be written ({error.strerror}); {self._remedy}"
            ) from error

        for name in self._files:
            self._make(name)

    @property
    def _remedy(self) -> str:
        return f"free space or set {self.elsewhere}=FOLDER"

    def _make(self, name: str) -> None:
        path = self._path(name)
        if path.exists():
            return
        shape, dtype = self._files[name]

        # A run beside this one may make the same file: the first one that is finished stays.
        with files.replacing(path, self._remedy, keep_other=True) as part, part.open("wb") as file:
            # Zeros that are really written: a full disk is an error now, not a crash later.
            np.lib.format.write_array(file, np.zeros(shape, dtype))

    def missing(self) -> list[int]:
        """Return the groups that are not finished."""
        return [int(i) for i in np.flatnonzero(self._open("groups") == 0)]

    def put(self, group: int, **rows: NDArray[Any]) -> None:
        """Store a group: the rows of every array. Rows past the end (padding) are dropped."""
        for name, column in self.columns.items():
            start = group * column.group
            stop = min(start + column.group, column.shape[0])

            array = self._open(name, "r+")
            array[start:stop] = rows[name][: stop - start]
            array.flush()

        done = self._open("groups", "r+")
        done[group] = 1
        done.flush()

    def read(self, name: str) -> NDArray[Any]:
        """Return an array, memory-mapped, finished or not."""
        return self._open(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _open(self, name: str, mode: Any = "r") -> np.memmap[Any, Any]:
        path = self._path(name)
        try:
            array = np.load(path, mmap_mode=mode)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"{path}: damaged; remove {self.folder} to {self.again} again"
            ) from error

        shape, dtype = self._files[name]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{path}: holds {array.dtype} {array.shape}, expected {dtype} {shape};"
                f" remove {self.folder} to {self.again} again"
            )
        return array


class ImageStore:
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
        columns = {"images": Column((images, *shape), np.uint8, batch)}
        self.arrays = GroupedArrays(folder, columns, again="sample", elsewhere="out")
        self.images, self.batch = images, batch

    def create(self) -> None:
        """Make the files; see `GroupedArrays.create`."""
        self.arrays.create()

    def missing(self) -> list[int]:
        """Return the groups that are not finished."""
        return self.arrays.missing()

    def put(self, group: int, pixels: NDArray[np.uint8]) -> None:
        """Store the images of a group; those past the end (padding) are dropped."""
        self.arrays.put(group, images=pixels)

    def read(self) -> NDArray[np.uint8]:
        """Return the whole set, memory-mapped.

        Raises:
            ValueError: if images are missing: fewer than asked is an error, never a number.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.arrays.folder}: {len(missing)} of {self.arrays.groups} groups of images are"
                " missing; run the same command again to finish them"
            )
        return self.arrays.read("images")
