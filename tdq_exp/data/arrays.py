"""Arrays on disk that are filled a group of rows at a time, with a map of the finished groups.

    <name>.npy    [N, ...], one or several
    groups.npy    uint64 [number of groups]   0: to be made; 3 * 2^32 + CRC-32: finished

The CRC-32 is of what the arrays are of, which their owner names, and of the group's rows: files of
another set do not match. Entries of an earlier version, 2^32 + CRC-32, are of the rows alone.

Processes write disjoint groups of the same files, so nothing is merged afterwards. An interrupted
run is continued where it stopped: a group's entry is set only after its rows are flushed. A group
whose rows do not match its entry is damaged: it is made again, or refused, never used.

CRC-32 reads 1 to 3 GB a second: 50,000 images of 32x32x3 take 0.1 s, of 256x256x3 4 to 10 s.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console

FINISHED = 1 << 32  # added to a group's CRC-32, so that no finished group is 0
NAMED = 1 << 33  # added where the CRC-32 counts what the arrays are of


def open_array(path: Path, mode: Any = "r") -> np.memmap[Any, Any]:
    """Return a `.npy` file, memory-mapped.

    Raises:
        ValueError: if it is no whole array: cut short, too long, of Python objects, or no file.
    """
    files.require_regular(path)
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # NumPy would take anything else for a pickle

        # Opened for writing, a file that was cut short would be filled up with zeros.
        array = np.load(path, mmap_mode="r")
        if path.stat().st_size != array.offset + array.nbytes:
            raise ValueError("its size is not that of its array")
        return array if mode == "r" else np.load(path, mmap_mode=mode)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, AttributeError) as error:
        known = error.strerror if isinstance(error, OSError) else None
        reason = known or (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path}: damaged ({reason})") from error


def finished_images(path: Path) -> np.memmap[Any, Any]:
    """Return the `images.npy` of a sampled set, wherever it lies, memory-mapped.

    Its checksums are not looked at: they need the set's record, as `python -m tdq_exp verify` has.

    Raises:
        ValueError: if it is damaged, or not finished: images that are missing are black, and would
            be measured as if they were the model's.
    """
    groups = path.with_name("groups.npy")
    if groups.is_file():
        done = open_array(groups)
        missing = int(np.count_nonzero(done == 0))
        if missing:
            raise ValueError(
                f"{path}: {missing} of {len(done)} groups of images are missing; run the command"
                " that samples them again"
            )
    return open_array(path)


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


def in_groups(images: int, size: int) -> list[range]:
    """Return the numbers of the images of each group: `[0..size-1], ...`; the last may be short."""
    return [range(first, min(first + size, images)) for first in range(0, images, size)]


class GroupedArrays:
    """Arrays in one folder that are filled together, group by group.

    Args:
        folder: of the files.
        columns: the arrays, by name; all of them have the same number of groups.
        again: what makes the arrays again, for messages: `encode`.
        elsewhere: the configuration key of the folder, for messages: `out`.
        of: what the arrays are of, such as a fingerprint.

    Raises:
        ValueError: from whatever opens a file, if it is damaged or of another shape or type.
        OSError: from `create`, if the folder can't be written.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, Column],
        again: str,
        elsewhere: str,
        of: str = "",
    ) -> None:
        self.folder, self.columns = folder, dict(columns)
        self.again, self.elsewhere, self.of = again, elsewhere, of

        (self.groups,) = {column.groups for column in self.columns.values()}
        self._files = {name: (tuple(c.shape), np.dtype(c.dtype)) for name, c in columns.items()}
        self._files["groups"] = ((self.groups,), np.dtype(np.uint64))

    def create(self) -> None:
        """Make the files, empty, if there are none; one process does this before any opens them.

        A damaged file is made anew, and a line says so.

        Raises:
            OSError: naming the folder, if it can't be written or is full.
            ValueError: if a file there is a whole one of another shape or type.
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
            self._remove_damaged(name)
            self._make(name)

    @property
    def _remedy(self) -> str:
        return f"free space or set {self.elsewhere}=FOLDER"

    def _remove_damaged(self, name: str) -> None:
        """Remove a file that is no whole array, or a map of before there were checksums."""
        path = self._path(name)
        if not path.exists():
            return

        reason = ""
        try:
            array = open_array(path)
            if name == "groups" and array.dtype == np.uint8 and array.shape == (self.groups,):
                reason = f"{path}: has no checksums, an earlier version wrote it"
        except ValueError as error:
            reason = str(error)

        if reason:
            console.print(f"{reason}: what it covers is made again")
            path.unlink()

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
        """Return the groups that are to be made: not finished, or damaged, which a line says."""
        unfinished = np.flatnonzero(self._open("groups") == 0)
        damaged = self.damaged()

        if damaged:
            console.print(
                f"{self.folder}: {len(damaged)} of {self.groups} groups do not match their"
                f" checksums: made again",
            )
            done = self._open("groups", "r+")
            done[damaged] = 0
            done.flush()
        return sorted([*(int(group) for group in unfinished), *damaged])

    def begun(self) -> bool:
        """Return whether there is a finished group, damaged or not."""
        try:
            return all(self._path(name).exists() for name in self._files) and bool(
                self._open("groups").any()
            )
        except ValueError:
            return False

    def damaged(self) -> list[int]:
        """Return the finished groups whose rows do not match their checksum. Reads everything."""
        done = self._open("groups")
        columns = {name: self._open(name) for name in self.columns}

        found = []
        for group in np.flatnonzero(done):
            rows = {name: array[self._rows(name, group)] for name, array in columns.items()}
            named = bool(int(done[group]) & NAMED)
            if int(done[group]) != self._entry(rows, named):
                found.append(int(group))
        return found

    def faults(self) -> list[str]:
        """Return what is wrong with the files, a line each; nothing is written."""
        try:
            unfinished = int(np.count_nonzero(self._open("groups") == 0))
            damaged = len(self.damaged())
        except ValueError as error:
            return [str(error)]

        found = []
        if unfinished:
            found.append(f"{self.folder}: {unfinished} of {self.groups} groups are missing")
        if damaged:
            found.append(f"{self.folder}: {damaged} of {self.groups} groups are damaged")
        return found

    def _rows(self, name: str, group: int | np.signedinteger[Any]) -> slice:
        """Return where a group's rows lie in an array."""
        column = self.columns[name]
        start = int(group) * column.group
        return slice(start, min(start + column.group, column.shape[0]))

    def _entry(self, rows: Mapping[str, NDArray[Any]], named: bool = True) -> int:
        """Return what the map says of a finished group with these rows.

        Args:
            rows: of every array.
            named: whether what the arrays are of counts; it did not in an earlier version.
        """
        checksum = zlib.crc32(self.of.encode()) if named else 0
        for name in self.columns:
            checksum = zlib.crc32(np.ascontiguousarray(rows[name]).view(np.uint8).data, checksum)
        return FINISHED | (NAMED if named else 0) | checksum

    def put(self, group: int, **rows: NDArray[Any]) -> None:
        """Store a group: the rows of every array. Rows past the end (padding) are dropped."""
        stored = {}
        for name, (_, dtype) in self._files.items():
            if name != "groups":
                part = self._rows(name, group)
                stored[name] = rows[name][: part.stop - part.start].astype(dtype, copy=False)

                array = self._open(name, "r+")
                array[part] = stored[name]
                array.flush()

        done = self._open("groups", "r+")
        done[group] = self._entry(stored)
        done.flush()

    def read(self, name: str) -> NDArray[Any]:
        """Return an array, memory-mapped, finished or not."""
        return self._open(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _open(self, name: str, mode: Any = "r") -> np.memmap[Any, Any]:
        path = self._path(name)
        try:
            array = open_array(path, mode)
        except ValueError as error:
            raise ValueError(f"{error}; remove {self.folder} to {self.again} again") from error

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
        of: fingerprint of the set.

    Raises:
        ValueError: if the files there are of another set.
        OSError: if the folder can't be written.
    """

    def __init__(
        self, folder: Path, images: int, batch: int, shape: tuple[int, int, int], of: str = ""
    ) -> None:
        columns = {"images": Column((images, *shape), np.uint8, batch)}
        self.arrays = GroupedArrays(folder, columns, again="sample", elsewhere="out", of=of)
        self.images, self.batch = images, batch

    def create(self) -> None:
        """Make the files; see `GroupedArrays.create`."""
        self.arrays.create()

    def missing(self) -> list[int]:
        """Return the groups that are not finished."""
        return self.arrays.missing()

    def begun(self) -> bool:
        """Return whether there is a finished group, damaged or not."""
        return self.arrays.begun()

    def faults(self) -> list[str]:
        """Return what is wrong with the files, a line each; see `GroupedArrays.faults`."""
        return self.arrays.faults()

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
