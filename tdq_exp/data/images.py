"""Training and held-out images: decoded once into a memory-mapped uint8 cache, read by index then.

A cache is one `.npy` of `[N, H, W, C]` uint8 and a `.json` beside it with the hash of
its content; the hash, never the path, is what a run's fingerprint cites. It is computed again when
a cache is read (half a gigabyte a second or more), and a damaged cache is decoded again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdq_exp.data.arrays import open_array
from tdq_exp.data.sources import Source
from tdq_exp.runtime import files
from tdq_exp.runtime.hashes import images_hash
from tdq_exp.runtime.progress import console

CACHE_REMEDY = "free space or set data.cache=FOLDER"
_HEADER = 128  # bytes, of a .npy file of images


def classes_at(labels: NDArray[np.int64] | None, index: Tensor) -> Tensor | None:
    """Return the class of some samples, `[B]`, int64; None without labels.

    Args:
        labels: of all samples, `[N]`.
        index: `[B]`, int64.
    """
    return None if labels is None else torch.from_numpy(labels[index.numpy()])


@dataclass(frozen=True)
class Images:
    """A set of images in memory-mapped form.

    Args:
        pixels: uint8 `[N, H, W, C]`.
        content: hash of the pixels, and of the labels if there are any.
        protocol: how they were cropped and resized, for the row.
        labels: int64 `[N]`, class of each image, where a model is conditioned on it.
    """

    pixels: NDArray[np.uint8]
    content: str
    protocol: str
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    @property
    def random(self) -> bool:
        """Whether a sample is a distribution: no, an image is its pixels."""
        return False

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return float images in [-1, 1], `[B, C, H, W]`, those with `flip` mirrored left to right.

        Args:
            index: `[B]`, int64.
            flip: `[B]`, bool.
            noise: not used.
        """
        picked = torch.from_numpy(self.pixels[index.numpy()])
        images = picked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return torch.where(flip[:, None, None, None], images.flip(-1), images).contiguous()

    def condition(self, index: Tensor) -> Tensor | None:
        """Return the class of some images, `[B]`, int64; None without labels."""
        return classes_at(self.labels, index)

    def labelled(self, labels: Sequence[int]) -> Images:
        """Return the same images with their classes.

        Args:
            labels: of the images in their order; those of images that were left out come last.

        Raises:
            ValueError: if there are fewer labels than images.
        """
        if len(labels) < len(self):
            raise ValueError(f"data: {len(labels)} class labels for {len(self)} images")

        classes = np.asarray(labels[: len(self)], dtype=np.int64)
        digest = hashlib.sha256(classes.tobytes()).hexdigest()[:16]
        return replace(self, content=f"{self.content}-{digest}", labels=classes)


@dataclass(frozen=True)
class Data:
    """The images of a run: those it is trained on, and those held out for validation."""

    train: Images
    held_out: Images

    def parts(self) -> dict[str, str]:
        """Return what the pixels are, for fingerprints; never where they lie."""
        return {
            "train": self.train.content,
            "held_out": self.held_out.content,
            "protocol": self.train.protocol,
        }


def to_uint8(x: Tensor, truncate: bool = False) -> Tensor:
    """Return the pixels of samples: `[B, C, H, W]` float -> `[B, H, W, C]` uint8.

    Args:
        x: samples; values outside of [-1, 1] are clamped, and levels are rounded to nearest.
        truncate: drop the fraction instead, as the release's sampling script does (half a level
            darker on average).

    Raises:
        FloatingPointError: for samples that hold NaN: as bytes they would be black pixels.
    """
    broken = int(x.isnan().flatten(1).any(1).sum())
    if broken:
        raise FloatingPointError(
            f"{broken} of {len(x)} images hold NaN: the network has diverged, and there is nothing"
            " to measure; look at its weights, or take more bits"
        )

    levels = x.clamp(-1, 1).add(1).mul(127.5)
    levels = levels.floor() if truncate else levels.round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def resize_center(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square, resized to size x size, bicubic and antialiased.

    PIL widens the kernel when it shrinks.
    """
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/tdq_exp`, or `~/.cache/tdq_exp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdq_exp"


def load_images(
    source: Source,
    split: str,
    *,
    size: int,
    channels: int,
    cache: str | None = None,
    limit: int | None = None,
    check: bool = True,
) -> Images:
    """Return the images of a split, decoded on first use.

    One process calls this first; the others find the cache.

    Args:
        source: `Digits`, `Hub` or `Folder`.
        split: `train` or `validation`.
        size: side in pixels after centre crop and resize.
        channels: 1 (gray) or 3.
        cache: folder for decoded sets; `default_cache()` if not given.
        limit: only the first so many; all of them if not given.
        check: whether the pixels are compared with their hash; False where another process did it.

    Raises:
        ValueError: for an unreadable source or image, naming it.
    """
    prepared = getattr(source, "prepared", None)
    before = f"{prepared}, " if prepared else ""
    protocol = f"{before}centre crop, bicubic to {size}x{size}x{channels}"
    some = f"|{limit}" if limit is not None else ""

    root = (Path(cache).expanduser() if cache else default_cache()) / "images"

    def cache_of(key: str) -> Path:
        """Return the cache's file without its ending: all that its content depends on."""
        name = hashlib.sha256(f"1|{key}|{protocol}{some}".encode()).hexdigest()[:20]
        return root / name

    source.settle(lambda key: cache_of(key).with_suffix(".json").exists())
    place = cache_of(source.key(split))
    pixels, meta = place.with_suffix(".npy"), place.with_suffix(".json")

    # The description is written last: where it is, the pixels are whole.
    content = _cached_content(place, source.key(split), (size, size, channels), check)
    if content is None:

        def decoded() -> Iterator[NDArray[np.uint8]]:
            for image in itertools.islice(source.read(split), limit):
                square = resize_center(image.convert("L" if channels == 1 else "RGB"), size)
                yield np.asarray(square, dtype=np.uint8).reshape(size, size, channels)

        with files.replacing(pixels, CACHE_REMEDY) as part, part.open("wb") as file:
            _write_rows(file, decoded(), (size, size, channels), split)

        array = open_array(pixels)
        content = images_hash(array)
        about = {
            "of": place.name,
            "source": source.key(split),
            "split": split,
            "content": content,
            "images": len(array),
        }
        files.write_json(meta, about, CACHE_REMEDY)

    return Images(open_array(pixels), content, protocol)


def _cached_content(
    place: Path, source: str, shape: tuple[int, int, int], check: bool
) -> str | None:
    """Return the hash of a cached set, or None if there is none, or a damaged one, with a line.

    Args:
        place: its files, without their endings.
        source: key of what it should be of.
        shape: (H, W, C).
        check: see `load_images`.
    """
    pixels, meta = place.with_suffix(".npy"), place.with_suffix(".json")
    try:
        about = files.read_json(meta, needs=["content", "images", "source"])
        if about is None:
            return None

        # Both files may have come from another set; an earlier version did not note its name.
        if about["source"] != source or about.get("of", place.name) != place.name:
            raise ValueError(f"{meta}: damaged (describes another set)")

        array = open_array(pixels)
        if array.shape != (about["images"], *shape) or array.dtype != np.uint8:
            raise ValueError(f"{pixels}: damaged (holds {array.dtype} {array.shape})")
        if check and images_hash(array) != about["content"]:
            raise ValueError(f"{pixels}: damaged (its pixels do not match their hash)")
        return str(about["content"])
    except ValueError as error:
        console.print(f"{str(error).partition(';')[0]}: decoded again")
        return None


def _write_rows(
    file: BinaryIO, rows: Iterable[NDArray[np.uint8]], shape: tuple[int, int, int], split: str
) -> None:
    """Write images as one `.npy`, one at a time: a set may be larger than the memory.

    The header comes last, for only then is the number of images known.
    """
    file.write(bytes(_HEADER))

    count = 0
    for row in rows:
        file.write(row.tobytes())
        count += 1

    if not count:
        raise ValueError(f"data: the {split} split holds no image")

    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(header, description)
    assert len(header.getvalue()) == _HEADER

    file.seek(0)
    file.write(header.getvalue())
