"""Images and statistics that somebody else made: a folder, an array, mean and covariance.

| what                | read as |
|---------------------|---------|
| folder              | every picture in it, nested or not, in sorted order |
| `.npy`              | uint8 `[N, H, W, C]` or `[N, H, W]` |
| `.npz`              | the same, of its only array of pixels; or `mu` `[D]` and `sigma` `[D, D]` |

A folder without pictures may be that of a set that a run sampled, if it is finished.

Pictures are decoded when they are asked for; arrays in `.npy` are mapped, not loaded.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdq_exp.data.arrays import finished_images
from tdq_exp.data.decode import decode_cell
from tdq_exp.data.images import resize_center
from tdq_exp.data.sources import pictures_in
from tdq_exp.runtime import files

# What reading a damaged file may raise: an array's header, an archive's parts, compressed data.
_DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)
_SET = ("images.npy", "groups.npy")  # of a run: see `data.arrays`
_UNEVEN = 1e-3  # share of the largest number by which halves of sigma may differ: single precision


@dataclass(frozen=True)
class GivenImages:
    """Images of a known number, decoded piece by piece.

    Args:
        path: where they are from.
        count: N.
        size: (H, W) of the first, before it is resized.
        piece: (start, stop) -> uint8 `[stop - start, H, W, C]`, at the size of the reference.
        notes: lines that a reader should see: what is left out.
        sizes: (H, W) of all that were decoded so far, before they were resized.
    """

    path: Path
    count: int
    size: tuple[int, int]
    piece: Callable[[int, int], NDArray[np.uint8]]
    notes: Sequence[str] = ()
    sizes: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class GivenStatistics:
    """Mean `[D]` and covariance `[D, D]` of features that nobody knows the name of."""

    path: Path
    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


def read(path: Path, size: int, channels: int) -> GivenImages | GivenStatistics:
    """Return what a path holds.

    Args:
        path: a folder of pictures, or a `.npy` or `.npz` file.
        size: side in pixels that images are cropped and resized to, as the reference was.
        channels: 1 (gray) or 3.

    Raises:
        ValueError: naming the file and what is wrong with it.
        FileNotFoundError: if there is nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path, size, channels)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: is no folder of pictures, .npy or .npz file")
    files.require_regular(path)

    try:
        if path.name == _SET[0] and path.with_name(_SET[1]).exists():
            return _array(path, finished_images(path), size, channels)

        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        # What the file holds counts, not what it is called.
        if isinstance(loaded, np.ndarray):
            return _array(path, loaded, size, channels)
        with loaded:
            return _archive(path, {key: loaded[key] for key in loaded.files}, size, channels)
    except _DAMAGED as error:
        raise ValueError(f"{path}: damaged ({error}); make it again") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: is no array of numbers ({error})") from error


def _folder(path: Path, size: int, channels: int) -> GivenImages | GivenStatistics:
    try:
        pictures, notes = pictures_in(path)
    except ValueError:
        for folder in (path, path / "images"):  # the set of a run, or its images
            if all((folder / name).is_file() for name in _SET):
                return read(folder / _SET[0], size, channels)
        raise
    _require_one_set(path)
    sizes: set[tuple[int, int]] = set()

    def piece(start: int, stop: int) -> NDArray[np.uint8]:
        resized = []
        for file in pictures[start:stop]:
            image = _open(file)
            sizes.add((image.height, image.width))
            resized.append(_resized(image, size, channels))
        return np.stack(resized)

    first = _open(pictures[0])
    return GivenImages(path, len(pictures), (first.height, first.width), piece, notes, sizes)


def _require_one_set(path: Path) -> None:
    """Refuse the folder of a run, with charts and a tracker's pictures in it, or of several sets.

    Raises:
        ValueError: naming the folder.
    """
    runs = sorted(file.parent for file in path.rglob("fit.json"))
    if runs:
        raise ValueError(f"{runs[0]}: is a run; name the folder of a set that it sampled, below it")
    sets = sorted(file.parent for file in path.rglob("samples.json"))
    if len(sets) > 1:
        raise ValueError(f"{path}: holds {len(sets)} sets of a run; name one: {sets[0]}")


def _open(file: Path) -> Image.Image:
    return decode_cell({"bytes": None, "path": str(file)}, str(file))


def _resized(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """Return a picture as the reference's images were made: cropped, resized, gray or coloured."""
    square = resize_center(image.convert("L" if channels == 1 else "RGB"), size)
    return np.asarray(square, dtype=np.uint8).reshape(size, size, channels)


def _archive(
    path: Path, arrays: dict[str, NDArray], size: int, channels: int
) -> GivenImages | GivenStatistics:
    if {"mu", "sigma"} <= arrays.keys():
        return _statistics(path, arrays["mu"], arrays["sigma"])

    pixels = [array for array in arrays.values() if array.dtype == np.uint8 and array.ndim >= 3]
    if len(pixels) != 1:
        raise ValueError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}; expected one uint8 array of images,"
            " or mu and sigma"
        )
    return _array(path, pixels[0], size, channels)


def _statistics(path: Path, mu: NDArray, sigma: NDArray) -> GivenStatistics:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no mean [D] and"
            " covariance [D, D]"
        )
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu" or not mu.size:
        raise ValueError(
            f"{path}: mu is of type {mu.dtype} {list(mu.shape)} and sigma of {sigma.dtype};"
            " expected real numbers, at least one of each"
        )

    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: mu or sigma holds numbers that are not finite")

    # Any square matrix has a distance by the formula; only a covariance's means anything.
    largest = float(np.abs(sigma).max())
    if (
        float(np.abs(sigma - sigma.T).max()) > _UNEVEN * largest
        or float(sigma.diagonal().min()) < 0
    ):
        raise ValueError(
            f"{path}: sigma is no covariance: it is not symmetric, or has variances below 0"
        )
    return GivenStatistics(path, mu, sigma)


def _array(path: Path, pixels: NDArray, size: int, channels: int) -> GivenImages:
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path}: is of type {pixels.dtype}; expected uint8 pixels from 0 to 255")
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4):
        # As [N, H, W] it would be as many slivers as the image has lines.
        raise ValueError(
            f"{path}: has shape {list(pixels.shape)}, that of one image [H, W, C]; expected"
            " [N, H, W, C] with C = 1 or 3"
        )

    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise ValueError(
            f"{path}: has shape {list(pixels.shape)}; expected [N, H, W, C] with C = 1 or 3"
        )

    def piece(start: int, stop: int) -> NDArray[np.uint8]:
        part = np.asarray(pixels[start:stop])
        if part.shape[1:] == (size, size, channels):
            return part
        squeezed = part[..., 0] if part.shape[3] == 1 else part
        return np.stack([_resized(Image.fromarray(one), size, channels) for one in squeezed])

    given_size = (pixels.shape[1], pixels.shape[2])
    return GivenImages(path, len(pixels), given_size, piece, sizes={given_size})
