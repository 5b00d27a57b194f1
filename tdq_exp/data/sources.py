"""Sources of images: scikit-learn's digits, a data set of the hub, a folder.

What people have on disk is read where it is: CIFAR as torchvision unpacks it (`Hub`), and LSUN's
databases (`Folder`). This is the only importer of `datasets`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from tdq_exp.data import cifar, lsun
from tdq_exp.data.decode import decode, first_line

T = TypeVar("T")
SPLITS = ("train", "validation")
HOLDOUT = 20  # every so many-th image, where a set has no held-out split of its own


class Source(Protocol):
    """Where images come from."""

    @property
    def notes(self) -> list[str]:
        """Lines that a reader should see: what is left out, or held out, and why."""
        ...

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Decide which images are held out, before any key or image is asked for.

        Args:
            cached: whether the images of a key are decoded already.
        """
        ...

    def key(self, split: str) -> str:
        """Return what is read, so that a cache is made again when the source changes."""
        ...

    def read(self, split: str) -> Iterator[Image.Image]:
        """Yield the images of a split, `train` or `validation`.

        Raises:
            ValueError: for an unreadable source or image, naming it.
        """
        ...


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 gray levels: nothing to download.

    Every fifth image is held out for validation; the rest is the training set.
    """

    channels = 1

    @property
    def notes(self) -> list[str]:
        return []

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Nothing is left to decide."""

    def key(self, split: str) -> str:
        return f"sklearn-digits/{split}"

    def read(self, split: str) -> Iterator[Image.Image]:
        from sklearn.datasets import load_digits

        for i, image in enumerate(load_digits().images):
            if (i % 5 == 0) == (split == "validation"):
                yield Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))


class Hub:
    """A data set of the hub, or a local path of the same layout, through `datasets.load_dataset`.

    A set without the held-out split, but with the one for training, has every 20th image of that
    held out. A local `cifar-10-batches-py` or `cifar-100-python`, as torchvision unpacks them, is
    read as it is.

    Args:
        path: hub id (`uoft-cs/cifar10`) or a local folder with the same files.
        train: name of the training split.
        validation: name of the held-out split.
        column: the image column; found by its type if not given.
        prepared: what was done to the images before, for the protocol that rows name:
            `256x256 as published`.
        holdout: hold every so many-th image of `train` out, whatever other splits there are.

    Raises:
        FileNotFoundError: if a local path is not there.
        ValueError: if a local folder is empty, or a database that `Folder` reads.
    """

    channels = 3

    def __init__(
        self,
        path: str,
        train: str = "train",
        validation: str = "test",
        column: str | None = None,
        prepared: str | None = None,
        holdout: int | None = None,
    ) -> None:
        self.path, self.column, self.prepared = path, column, prepared
        self._split = {"train": train, "validation": validation}
        if holdout is not None:
            _check_holdout(holdout)
        self._holdout = holdout
        self._told_to_hold_out = self._settled = holdout is not None

        local = Path(path).expanduser()
        self._local = local if local.exists() else None
        if self._local is None and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise FileNotFoundError(f"data.source.path={path}: no such folder")
        if self._local is None:
            self._cifar = None
            return

        if lsun.is_lmdb(self._local):
            raise ValueError(f"data.source.path={path}: is an LMDB, which data=image_folder reads")
        if not any(f.is_file() for f in self._local.rglob("*")):
            raise ValueError(f"data.source.path={path}: the folder is empty")
        self._cifar = cifar.layout_of(self._local)

    @property
    def notes(self) -> list[str]:
        if self._holdout is None or self._told_to_hold_out:
            return []
        train, absent = self._split["train"], self._split["validation"]
        return [
            f"data.source.path={self.path}: has no split {absent!r}, so every {self._holdout}th"
            f" image of {train!r} is held out; data.source.validation=SPLIT names another"
        ]

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Hold images of the training split out if the set has no other.

        Where both splits are decoded already, nobody is asked; the hub may be out of reach.
        """
        if self._settled or self._cifar is not None:
            return
        self._settled = True
        if all(cached(self.key(split)) for split in SPLITS):
            return

        # A set that was decoded with a hold-out has keys that say so.
        self._holdout = HOLDOUT
        if all(cached(self.key(split)) for split in SPLITS):
            return

        self._holdout = None
        splits, (train, validation) = self._splits(), self._split.values()
        sliced = "[" in validation or "+" in validation  # `train[:5%]` is no name
        if train in splits and validation not in splits and not sliced:
            self._holdout = HOLDOUT

    def _splits(self) -> list[str]:
        """Return the names of the set's splits; none if only reading it can say what is wrong."""
        import datasets

        try:
            return list(datasets.get_dataset_split_names(self._name))
        except ConnectionError as error:
            raise self._unreadable(error) from error
        except Exception:
            return []

    def _unreadable(self, error: Exception) -> ValueError:
        hint = (
            ""
            if self._local
            else "; if this machine has no network, set data.source.path to a local copy"
        )
        return ValueError(
            f"data.source.path={self.path}: can't be read ({first_line(error)}){hint}"
        )

    @property
    def _name(self) -> str:
        return str(self._local) if self._local is not None else self.path

    def key(self, split: str) -> str:
        files: list[str] = []
        if self._local is not None:
            stats = ((f, f.stat()) for f in sorted(self._local.rglob("*")) if f.is_file())
            files = [f"{f.name}:{s.st_size}:{s.st_mtime_ns}" for f, s in stats]

        name = self._split[split]
        if self._holdout is not None:
            name = f"{self._split['train']}, {split} of every {self._holdout}th"
        return (
            f"{self.path}/{name}/{self.column}/"
            + hashlib.sha256("\n".join(files).encode()).hexdigest()
        )

    def read(self, split: str) -> Iterator[Image.Image]:
        whole = split if self._holdout is None else "train"
        if self._cifar is not None:
            images = self._read_cifar(whole)
        else:
            images = self._read_table(whole)
        return images if self._holdout is None else _part(images, self._holdout, split)

    def _read_cifar(self, split: str) -> Iterator[Image.Image]:
        assert self._cifar is not None
        folder, splits = self._cifar
        name = self._split[split]
        if name not in splits:
            raise ValueError(
                f"data.source.{split}={name}: {folder} has the splits {', '.join(splits)}"
            )
        return cifar.read_split(folder, splits[name])

    def _read_table(self, split: str) -> Iterator[Image.Image]:
        import datasets

        try:
            table: Any = datasets.load_dataset(self._name, split=self._split[split])
        except ValueError as error:
            raise ValueError(
                f"data.source.path={self.path}: {first_line(error)}; name the splits with"
                " data.source.train and data.source.validation, or hold some of the first out with"
                f" data.source.holdout={HOLDOUT}"
            ) from error
        except Exception as error:  # its own types for broken files, requests' for the network
            raise self._unreadable(error) from error

        # Bytes are decoded here, so that an error can name the image.
        column = self.column or _image_column(table.features, self.path)
        table = table.cast_column(column, datasets.Image(decode=False))

        for i, row in enumerate(table):
            yield _decode(row[column], f"{self.path}[{self._split[split]}][{i}]")


class Folder:
    """A folder of image files, nested or not, or a database of LSUN (LMDB).

    Folders that are links are followed, each real folder once. Files of other kinds are left out
    and counted in `notes`.

    Args:
        path: the folder.
        holdout: every so many-th file in sorted order is held out for validation: 20 holds out 5 %.
        channels: 3, or 1 for gray.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no image.
    """

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

    def __init__(self, path: str, holdout: int = HOLDOUT, channels: int = 3) -> None:
        self.root, self.holdout, self.channels = Path(path).expanduser(), holdout, channels
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.source.path={path}: no such folder")
        _check_holdout(holdout)

        # A database has keys in place of files.
        self._left_out: Counter[str] = Counter()
        self._files: list[Path] = []
        self._database = lsun.is_lmdb(self.root)
        if self._database:
            self._count = lsun.count(self.root)
            return

        self._files = sorted(self._walk())
        self._count = len(self._files)
        if not self._files:
            hint = "; data=cifar10 reads it" if cifar.layout_of(self.root) else ""
            raise ValueError(
                f"data.source.path={path}: holds no {', '.join(self.suffixes)} file{hint}"
            )

    def _walk(self) -> Iterator[Path]:
        """Yield the image files, and count the others."""
        seen: set[tuple[int, int]] = set()

        for folder, below, names in os.walk(self.root, followlinks=True):
            # A link to a folder above would never end; one beside would show its images twice.
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                below.clear()
                self._left_out["link to a folder that is read already"] += 1
                continue
            seen.add((here.st_dev, here.st_ino))
            below.sort()

            for name in names:
                file = Path(folder, name)
                if file.suffix.lower() not in self.suffixes:
                    self._left_out[file.suffix.lower() or "file without a suffix"] += 1
                elif name.startswith("._"):  # macOS keeps attributes of NAME in ._NAME
                    self._left_out["file of attributes (._)"] += 1
                elif file.is_file() or not file.exists():
                    yield file  # a link to nowhere is refused when it is read
                else:
                    self._left_out["no regular file"] += 1

    @property
    def notes(self) -> list[str]:
        if not self._left_out:
            return []
        counts = ", ".join(f"{count} {what}" for what, count in self._left_out.most_common())
        return [
            f"data.source.path={self.root}: {self._count} images; left out: {counts} (what is read:"
            f" {', '.join(self.suffixes)})"
        ]

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Nothing is left to decide."""

    def _of(self, split: str) -> list[Path]:
        return list(_part(iter(self._files), self.holdout, split))

    def key(self, split: str) -> str:
        if self._database:
            state = _stat(self.root / "data.mdb")
            listing = f"{self._count}:{state.st_size}:{state.st_mtime_ns}"
        else:
            stats = ((f, _stat(f)) for f in self._of(split))
            listing = "\n".join(
                f"{f.relative_to(self.root)}:{s.st_size}:{s.st_mtime_ns}" for f, s in stats
            )

        # 2: orientation and transparency as `decode` has them.
        return f"folder2/{split}/{self.holdout}/" + hashlib.sha256(listing.encode()).hexdigest()

    def read(self, split: str) -> Iterator[Image.Image]:
        if self._count < 2 and split == "train":
            raise ValueError(
                f"data.source.path={self.root}: too few images to hold any out for {split}"
            )
        if self._database:
            for key, raw in _part(lsun.values(self.root), self.holdout, split):
                yield decode(raw, f"{self.root}[{key}]")
            return
        for file in self._of(split):
            yield _decode({"bytes": None, "path": str(file)}, str(file))


def _check_holdout(holdout: int) -> None:
    if not isinstance(holdout, int) or isinstance(holdout, bool) or holdout < 2:
        raise ValueError(
            f"data.source.holdout={holdout}: at least 2, every so many-th image is held out"
        )


def _part(items: Iterator[T], holdout: int, split: str) -> Iterator[T]:
    """Yield every so many-th item for `validation`, beginning with the first, or all others."""
    for i, item in enumerate(items):
        if (i % holdout == 0) == (split == "validation"):
            yield item


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ValueError(
            f"{file}: can't be read ({error.strerror}); replace or remove it"
        ) from error


def _decode(cell: dict[str, Any], name: str) -> Image.Image:
    """Return the image of a cell of a table: its bytes, or its file."""
    try:
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{name}: can't be read ({error.strerror}); replace or remove it"
        ) from error
    return decode(raw, name)


def _image_column(features: Any, path: str) -> str:
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(found) != 1:
        raise ValueError(
            f"data.source.column: {path} has {len(found)} image columns"
            f" ({', '.join(features)}); name one"
        )
    return str(found[0])
