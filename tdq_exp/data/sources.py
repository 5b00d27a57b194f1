"""Sources of images: scikit-learn's digits, a data set of the hub, a folder.

This is the only importer of `datasets`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from tdq_exp.runtime import hub


class Source(Protocol):
    """Where images come from."""

    def key(self, split: str) -> str:
        """Return what is read, so that a cache is made again when the source changes."""
        ...

    def read(self, split: str) -> Iterator[Image.Image]:
        """Yield the images of a split, `train` or `validation`.

        Raises:
            ValueError: for an unreadable source or image, naming it.
        """
        ...

    def labels(self, split: str) -> list[int]:
        """Return the class of each image of a split, for models that are conditioned on it.

        Raises:
            ValueError: if the images have no classes.
        """
        ...


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 gray levels: nothing to download.

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

    def labels(self, split: str) -> list[int]:
        from sklearn.datasets import load_digits

        targets = enumerate(load_digits().target)
        return [int(c) for i, c in targets if (i % 5 == 0) == (split == "validation")]


class Hub:
    """A data set of the hub, or a local path of the same layout, through `datasets.load_dataset`.

    Args:
        path: hub id (`uoft-cs/cifar10`) or a local folder with the same files.
        train: name of the training split.
        validation: name of the held-out split.
        column: the image column; found by its type if not given.
        prepared: what was done to the images before, for the protocol that rows name:
            `256x256 as published`.

    Raises:
        FileNotFoundError: if a local path is not there.
        ValueError: if a local folder is empty.
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
            f"{self.path}/{self._split[split]}/{self.column}/"
            + hashlib.sha256("\n".join(files).encode()).hexdigest()
        )

    def _table(self, split: str) -> Any:
        """Return the table of a split.

        Raises:
            ValueError: if it can't be read, naming the path.
        """
        import datasets

        name = str(self._local) if self._local is not None else self.path
        if self._local is None:
            hub.prepare()
        try:
            return datasets.load_dataset(name, split=self._split[split])
        except ValueError as error:
            raise ValueError(f"data.source.path={self.path}: {_first_line(error)}") from error
        except Exception as error:  # its own types for broken files, requests' for the network
            hint = (
                ""
                if self._local
                else "; if this machine has no network, set data.source.path to a local copy"
            )
            raise ValueError(
                f"data.source.path={self.path}: can't be read ({_first_line(error)}){hint}"
            ) from error

    def read(self, split: str) -> Iterator[Image.Image]:
        import datasets

        table = self._table(split)

        # Bytes are decoded here, so that an error can name the image.
        column = self.column or _image_column(table.features, self.path)
        table = table.cast_column(column, datasets.Image(decode=False))

        for i, row in enumerate(table):
            yield _decode(row[column], f"{self.path}[{self._split[split]}][{i}]")

    def labels(self, split: str) -> list[int]:
        table = self._table(split)
        columns = [n for n, kind in table.features.items() if type(kind).__name__ == "ClassLabel"]
        if len(columns) != 1:
            raise ValueError(
                f"data.source.path={self.path}: has {len(columns)} columns of class labels;"
                " a class-conditional model needs one"
            )
        return [int(c) for c in table[columns[0]]]


class Folder:
    """A folder of image files, nested or not.

    Args:
        path: the folder.
        holdout: every so many-th file in sorted order is held out for validation: 20 holds out 5 %.
        channels: 3, or 1 for gray.
    """

    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

    def __init__(self, path: str, holdout: int = 20, channels: int = 3) -> None:
        self.root, self.holdout, self.channels = Path(path).expanduser(), holdout, channels
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.source.path={path}: no such folder")
        if holdout < 2:
            raise ValueError(
                f"data.source.holdout={holdout}: at least 2, every so many-th image is held out"
            )
        self._files = sorted(f for f in self.root.rglob("*") if f.suffix.lower() in self.suffixes)
        if not self._files:
            raise ValueError(f"data.source.path={path}: holds no {', '.join(self.suffixes)} file")

    def _of(self, split: str) -> list[Path]:
        return [
            f
            for i, f in enumerate(self._files)
            if (i % self.holdout == 0) == (split == "validation")
        ]

    def key(self, split: str) -> str:
        stats = ((f, _stat(f)) for f in self._of(split))
        listing = "\n".join(
            f"{f.relative_to(self.root)}:{s.st_size}:{s.st_mtime_ns}" for f, s in stats
        )
        return f"folder/{split}/{self.holdout}/" + hashlib.sha256(listing.encode()).hexdigest()

    def read(self, split: str) -> Iterator[Image.Image]:
        import datasets

        files = [str(f) for f in self._of(split)]
        if not files:
            raise ValueError(
                f"data.source.path={self.root}: too few images to hold any out for {split}"
            )
        table = datasets.Dataset.from_dict({"image": files}).cast_column(
            "image", datasets.Image(decode=False)
        )
        for row in table:
            yield _decode(row["image"], str(row["image"]["path"]))

    def labels(self, split: str) -> list[int]:
        """Return the number of each file's subfolder, in sorted order of their names."""
        names = sorted({f.parent for f in self._files})
        if self.root in names:
            raise ValueError(
                f"data.source.path={self.root}: a class-conditional model needs one subfolder for"
                " each class, and no image beside them"
            )
        return [names.index(f.parent) for f in self._of(split)]


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ValueError(
            f"{file}: can't be read ({error.strerror}); replace or remove it"
        ) from error


def _decode(cell: dict[str, Any], name: str) -> Image.Image:
    try:
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        image = Image.open(io.BytesIO(raw))
        image.load()  # a truncated file is found here, not at opening
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: not a whole image ({_first_line(error)}); replace or remove it"
        ) from error
    return image


def _image_column(features: Any, path: str) -> str:
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(found) != 1:
        raise ValueError(
            f"data.source.column: {path} has {len(found)} image columns"
            f" ({', '.join(features)}); name one"
        )
    return str(found[0])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
