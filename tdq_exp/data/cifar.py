"""CIFAR in the files of its authors, as torchvision unpacks them: `cifar-10-batches-py`.

The files are pickles, and a pickle may execute anything. Here it can't: of a file's names only the
three that a NumPy array needs mean something, and they mean the classes below, which hold what they
are given and run nothing. The array is then made of its bytes.

Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Folder -> split -> its files, in order.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar-10-batches-py": {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    },
    "cifar-100-python": {"train": ("train",), "test": ("test",)},
}
SIDE, CHANNELS = 32, 3


def layout_of(folder: Path) -> tuple[Path, dict[str, tuple[str, ...]]] | None:
    """Return the folder of the batches and its files by split, or None if it holds no CIFAR.

    Args:
        folder: the folder of the batches, or the one that holds it (torchvision's `root`).
    """
    for name, splits in LAYOUTS.items():
        every = [file for files in splits.values() for file in files]
        for place in (folder, folder / name):
            described = (place / "meta").exists() or (place / "batches.meta").exists()
            if described and all((place / file).is_file() for file in every):
                return place, splits
    return None


def read_batch(path: Path) -> NDArray[np.uint8]:
    """Return the images of one file, uint8 `[N, 32, 32, 3]`.

    Raises:
        ValueError: naming the file, if it is damaged or holds anything else.
    """
    pixels = _read(path, lambda batch: batch["data"].pixels())
    # A row has the red plane, then the green one, then the blue one.
    return pixels.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)


def labels_of(folder: Path, names: tuple[str, ...]) -> list[int]:
    """Return the class of each image of some files, in order; of CIFAR-100 the fine ones.

    Raises:
        ValueError: naming the file, if it is damaged or holds anything else.
    """
    return [label for name in names for label in _read(folder / name, _labels)]


def _labels(batch: dict[str, Any]) -> list[int]:
    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("its labels are no list of integers")
    return labels


def _read(path: Path, pick: Callable[[dict[str, Any]], Any]) -> Any:
    """Return what is picked of a file's dict, its keys as text."""
    try:
        with path.open("rb") as stream:
            batch = _InertUnpickler(stream, encoding="bytes").load()
        named = {k.decode() if isinstance(k, bytes) else k: value for k, value in batch.items()}
        return pick(named)
    except Exception as error:  # a damaged pickle is a random program
        raise ValueError(
            f"{path}: damaged, or not a batch of CIFAR ({type(error).__name__}: {error})"
        ) from error


def read_split(folder: Path, names: tuple[str, ...]) -> Iterator[Image.Image]:
    """Yield the images of some files, in order."""
    for name in names:
        for pixels in read_batch(folder / name):
            yield Image.fromarray(np.ascontiguousarray(pixels))


class _Dtype:
    """What a file says of an array's type; only `u1` is read."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Take no state from a file."""


class _Array:
    """What a file says of an array."""

    shape: Any = None
    dtype: Any = None
    fortran: Any = None
    raw: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep (version, shape, type, order, bytes)."""
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def pixels(self) -> NDArray[np.uint8]:
        """Return the array, if it is one of pixels."""
        width = CHANNELS * SIDE * SIDE
        if not isinstance(self.dtype, _Dtype) or self.dtype.name != "u1" or self.fortran:
            raise ValueError("its array is not one of bytes")
        if not isinstance(self.raw, bytes) or len(self.shape) != 2 or self.shape[1] != width:
            raise ValueError(f"its array has the shape {self.shape}, wanted [N, {width}]")
        return np.frombuffer(self.raw, np.uint8).reshape(self.shape)


def _new_array(*_: Any) -> _Array:
    """Return an array that its state will describe."""
    return _Array()


def _encoded(text: Any, encoding: Any = None) -> bytes:
    """Return bytes that Python 3 wrote into a pickle of Python 2's protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
}


class _InertUnpickler(pickle.Unpickler):
    """A pickle reader that knows the names of `_KNOWN`, and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"names {module}.{name}, which no batch of CIFAR does")
