"""Training and held-out images: decoded once into a memory-mapped uint8 cache, read by index from then on.

The only importer of `datasets`. A cache is one `.npy` of `[N, H, W, C]` uint8 and a `.json` beside it with the hash of
its content; the hash, never the path, is what a run's fingerprint cites.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SPLITS = ("train", "validation")
_HEADER = 128  # bytes, of a .npy file of images


@dataclass(frozen=True)
class Images:
    """A set of images in memory-mapped form.

    Args:
        pixels: uint8 `[N, H, W, C]`.
        content: hash of the pixels.
        protocol: how they were cropped and resized, for the row.
    """

    pixels: NDArray[np.uint8]
    content: str
    protocol: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width, channels = self.pixels.shape[1:]
        return channels, height, width

    @property
    def random(self) -> bool:
        """Nothing is drawn: an image is its pixels."""
        return False

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """Float images in [-1, 1], `[B, C, H, W]`, those with `flip` mirrored left to right; `noise` is not used."""
        picked = torch.from_numpy(self.pixels[index.numpy()])
        images = picked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return torch.where(flip[:, None, None, None], images.flip(-1), images).contiguous()


def to_uint8(x: Tensor, truncate: bool = False) -> Tensor:
    """Pixels of samples in [-1, 1]: `[B, C, H, W]` float -> `[B, H, W, C]` uint8, rounded to nearest.

    Args:
        x: samples; values outside of [-1, 1] are clamped.
        truncate: drop the fraction instead, as the release's sampling script does (half a level darker on average).
    """
    levels = x.clamp(-1, 1).add(1).mul(127.5)
    levels = levels.floor() if truncate else levels.round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Source(Protocol):
    """Where images come from. `key` says what is read, so that a cache is made again when the source changes."""

    def key(self, split: str) -> str: ...

    def read(self, split: str) -> Iterator[Image.Image]: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 gray levels: the embedded default, nothing to download.

    Every fifth image is held out for validation; the rest is the training set.
    """

    channels = 1

    def key(self, split: str) -> str:
        return f"sklearn-digits/{split}"

    def read(self, split: str) -> Iterator[Image.Image]:
        from sklearn.datasets import load_digits

        for i, image in enumerate(load_digits().images):
            if (i % 5 == 0) == (split == "validation"):
                yield Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))


class Hub:
    """A data set of the hub, or a local path of the same layout, through `datasets.load_dataset`.

    Args:
        path: hub id (`uoft-cs/cifar10`) or a local folder with the same files.
        train: name of the training split.
        validation: name of the held-out split.
        column: the image column; found by its type if not given.
        prepared: what was done to the images before, for the protocol that rows name: `256x256 as published`.
    """

    channels = 3

    def __init__(
        self,
        path: str,
        train: str = "train",
        validation: str = "test",
        column: str | None = None,
        prepared: str | None = None,
    ) -> None:
        self.path, self.column, self.prepared = path, column, prepared
        self._split = {"train": train, "validation": validation}
        local = Path(path).expanduser()
        self._local = local if local.exists() else None
        if self._local is None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise FileNotFoundError(f"data.source.path={path}: no such folder")
        if self._local is not None and not any(f.is_file() for f in self._local.rglob("*")):
            raise ValueError(f"data.source.path={path}: the folder is empty")

    def key(self, split: str) -> str:
        files: list[str] = []
        if self._local is not None:
            stats = ((f, f.stat()) for f in sorted(self._local.rglob("*")) if f.is_file())
            files = [f"{f.name}:{s.st_size}:{s.st_mtime_ns}" for f, s in stats]
        return (
            f"{self.path}/{self._split[split]}/{self.column}/" + hashlib.sha256("\n".join(files).encode()).hexdigest()
        )

    def read(self, split: str) -> Iterator[Image.Image]:
        import datasets

        name = str(self._local) if self._local is not None else self.path
        try:
            table: Any = datasets.load_dataset(name, split=self._split[split])
        except ValueError as error:
            raise ValueError(f"data.source.path={self.path}: {_first_line(error)}") from error
        except Exception as error:  # the library raises its own types for broken files, and requests' for the network
            hint = "" if self._local else "; if this machine has no network, set data.source.path to a local copy"
            raise ValueError(f"data.source.path={self.path}: can't be read ({_first_line(error)}){hint}") from error
        column = self.column or _image_column(table.features, self.path)
        table = table.cast_column(column, datasets.Image(decode=False))
        for i, row in enumerate(table):
            yield _decode(row[column], f"{self.path}[{self._split[split]}][{i}]")


class Folder:
    """A folder of image files, nested or not; every `holdout`-th in sorted order is held out for validation.

    Args:
        path: the folder.
        holdout: 20 holds out 5 %.
        channels: 3, or 1 for gray.
    """

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

    def __init__(self, path: str, holdout: int = 20, channels: int = 3) -> None:
        self.root, self.holdout, self.channels = Path(path).expanduser(), holdout, channels
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.source.path={path}: no such folder")
        if holdout < 2:
            raise ValueError(f"data.source.holdout={holdout}: at least 2, every so many-th image is held out")
        self._files = sorted(f for f in self.root.rglob("*") if f.suffix.lower() in self.suffixes)
        if not self._files:
            raise ValueError(f"data.source.path={path}: holds no {', '.join(self.suffixes)} file")

    def _of(self, split: str) -> list[Path]:
        return [f for i, f in enumerate(self._files) if (i % self.holdout == 0) == (split == "validation")]

    def key(self, split: str) -> str:
        stats = ((f, _stat(f)) for f in self._of(split))
        listing = "\n".join(f"{f.relative_to(self.root)}:{s.st_size}:{s.st_mtime_ns}" for f, s in stats)
        return f"folder/{split}/{self.holdout}/" + hashlib.sha256(listing.encode()).hexdigest()

    def read(self, split: str) -> Iterator[Image.Image]:
        import datasets

        files = [str(f) for f in self._of(split)]
        if not files:
            raise ValueError(f"data.source.path={self.root}: too few images to hold any out for {split}")
        table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image(decode=False))
        for row in table:
            yield _decode(row["image"], str(row["image"]["path"]))


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ValueError(f"{file}: can't be read ({error.strerror}); replace or remove it") from error


def _decode(cell: dict[str, Any], name: str) -> Image.Image:
    try:
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        image = Image.open(io.BytesIO(raw))
        image.load()  # a truncated file is found here, not at opening
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a whole image ({_first_line(error)}); replace or remove it") from error
    return image


def _image_column(features: Any, path: str) -> str:
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(found) != 1:
        raise ValueError(f"data.source.column: {path} has {len(found)} image columns ({', '.join(features)}); name one")
    return str(found[0])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def resize_center(image: Image.Image, size: int) -> Image.Image:
    """Largest centred square, then antialiased bicubic to size x size (PIL widens the kernel when it shrinks)."""
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/tdq_exp`, or `~/.cache/tdq_exp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdq_exp"


def load_images(
    source: Source,
    split: str,
    *,
    size: int,
    channels: int,
    cache: str | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Images:
    """The images of a split, decoded on first use. One process calls this first; the others find the cache.

    Args:
        source: `Digits`, `Hub` or `Folder`.
        split: `train` or `validation`.
        size: side in pixels after centre crop and resize.
        channels: 1 (gray) or 3.
        cache: folder for decoded sets; `default_cache()` if not given.
        limit: only the first so many; all of them if not given.
        progress: called with the number of images decoded so far.

    Raises:
        ValueError: for an unreadable source or image, naming it.
    """
    prepared = getattr(source, "prepared", None)
    before = f"{prepared}, " if prepared else ""
    protocol = f"{before}centre crop, bicubic to {size}x{size}x{channels}"
    some = f"|{limit}" if limit is not None else ""
    key = hashlib.sha256(f"1|{source.key(split)}|{protocol}{some}".encode()).hexdigest()[:20]
    root = (Path(cache).expanduser() if cache else default_cache()) / "images"
    pixels, meta = root / f"{key}.npy", root / f"{key}.json"
    if not meta.exists():
        root.mkdir(parents=True, exist_ok=True)

        def decoded() -> Iterator[NDArray[np.uint8]]:
            for number, image in enumerate(itertools.islice(source.read(split), limit), 1):
                square = resize_center(image.convert("L" if channels == 1 else "RGB"), size)
                yield np.asarray(square, dtype=np.uint8).reshape(size, size, channels)
                if progress is not None:
                    progress(number)

        _replace(pixels, lambda f: _write_rows(f, decoded(), (size, size, channels), split))
        array = np.load(pixels, mmap_mode="r")
        about = {"source": source.key(split), "split": split, "content": _hash(array), "images": len(array)}
        _replace(meta, lambda f: f.write(json.dumps(about, indent=1).encode()))
    about = json.loads(meta.read_text())
    return Images(np.load(pixels, mmap_mode="r"), about["content"], protocol)


def _write_rows(file: BinaryIO, rows: Iterable[NDArray[np.uint8]], shape: tuple[int, int, int], split: str) -> None:
    """Writes images as one `.npy`, one at a time: a set may be larger than the memory. Its header comes last."""
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


def _hash(array: NDArray[np.uint8]) -> str:
    """Of shape and pixels, read piece by piece."""
    digest = hashlib.sha256(repr(array.shape).encode())
    for start in range(0, len(array), 1024):
        digest.update(array[start : start + 1024].tobytes())
    return digest.hexdigest()[:16]


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    """Writes beside the target and renames: a reader finds the whole file or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            write(file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
