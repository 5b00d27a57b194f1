"""Rows of one tensor, kept in memory or in a file, as a budget says.

A block's inputs at full scale are tens of gigabytes. They are written once and read a batch at a
time with plain reads: the pages of a memory map would count as this process' own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Spill:
    """`[N, ...]`, floats in single precision, integers as they are.

    Args:
        rows: N.
        shape: of a row.
        file: where the rows lie, or None: in memory. Several processes may write disjoint rows of
            one file.
        dtype: of the rows.

    Raises:
        OSError: naming the file, if it can't be written or the disk is full.
    """

    def __init__(
        self,
        rows: int,
        shape: Sequence[int],
        file: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.shape, self.file, self.dtype = rows, tuple(shape), file, dtype
        self.row_bytes = dtype.itemsize * int(torch.Size(self.shape).numel())
        self._memory = torch.empty(rows, *self.shape, dtype=dtype) if file is None else None
        self._handle = -1
        if file is not None:
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)

    def put(self, first: int, values: Tensor) -> None:
        """Store rows from index `first` on."""
        values = values.detach().to(self.dtype).cpu().contiguous()
        if self._memory is not None:
            self._memory[first : first + len(values)] = values
            return
        raw = values.numpy().reshape(-1).view("u1").data
        at = first * self.row_bytes
        try:
            while raw:
                written = os.pwrite(self._handle, raw, at)
                raw, at = raw[written:], at + written
        except OSError as error:
            raise OSError(
                f"{self.file}: can't be written ({error.strerror}); free space or set out=FOLDER"
            ) from error

    def take(self, index: Tensor) -> Tensor:
        """Return rows `[B, ...]` of some indices, in memory."""
        if self._memory is not None:
            return self._memory[index]
        found = torch.empty(len(index), *self.shape, dtype=self.dtype)
        raw = found.numpy().reshape(-1).view("u1").data
        for place, row in enumerate(index.tolist()):
            part = raw[place * self.row_bytes : (place + 1) * self.row_bytes]
            if os.preadv(self._handle, [part], row * self.row_bytes) != self.row_bytes:
                raise OSError(f"{self.file}: ends early; run the same command again")
        return found

    def close(self) -> None:
        """Free the memory; the file's owner removes the file."""
        self._memory = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def kept_type(tensor: Tensor) -> torch.dtype:
    """Return the type in which a tensor is kept: an index, such as a class label, stays one."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def needed_bytes(rows: int, shapes: Sequence[Sequence[int]]) -> int:
    """Return what tensors of these row shapes take in single precision."""
    return sum(4 * rows * int(torch.Size(shape).numel()) for shape in shapes)
