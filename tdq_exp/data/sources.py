"""Sources of images: what they have in common, scikit-learn's digits, and folders.

What people have on disk is read where it is: CIFAR as torchvision unpacks it (`tables.Hub`), and
LSUN's databases (`Folder`).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from tdq_exp.data import cifar, lsun
from tdq_exp.data.decode import decode, decode_cell
from tdq_exp.data.holdout import HOLDOUT, check_holdout, part

GRID = "grid.png"  # in a folder of generated images, the picture of many of them


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

    @property
    def notes(self) -> list[str]:
        return []

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Do nothing: the split of this set is fixed."""

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


class Folder:
    """A folder of image files, nested or not, or a database of LSUN (LMDB).

    Folders that are links are followed, each real folder once. Files of other kinds, and folders
    that programs leave behind (`.ipynb_checkpoints`), are left out and counted in `notes`.

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
        check_holdout(holdout)

        # A database has keys in place of files.
        self._left_out: Counter[str] = Counter()
        self.files: list[Path] = []
        self.is_database = lsun.is_lmdb(self.root)
        if self.is_database:
            self._count = lsun.count(self.root)
            return

        self.files = sorted(self._walk())
        self._count = len(self.files)
        if not self.files:
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

            # Copies and thumbnails that programs leave behind: as images they would count twice,
            # and as folders be classes.
            self._left_out["folder of a program's own"] += sum(map(_of_a_program, below))
            below[:] = sorted(name for name in below if not _of_a_program(name))

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
        left_out = +self._left_out
        if not left_out:
            return []
        counts = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
        return [
            f"data.source.path={self.root}: {self._count} images; left out: {counts} (what is read:"
            f" {', '.join(self.suffixes)})"
        ]

    @property
    def in_subfolders(self) -> bool:
        """Whether the first images are those of some folders alone, such as of some classes."""
        return len({file.parent for file in self.files}) > 1

    def settle(self, cached: Callable[[str], bool]) -> None:
        """Do nothing: the place of an image in the list decides whether it is held out."""

    def _of(self, split: str) -> list[Path]:
        return list(part(iter(self.files), self.holdout, split))

    def key(self, split: str) -> str:
        if self.is_database:
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
        if self.is_database:
            for key, raw in part(lsun.values(self.root), self.holdout, split):
                yield decode(raw, f"{self.root}[{key}]")
            return
        for file in self._of(split):
            yield decode_cell({"bytes": None, "path": str(file)}, str(file))

    def labels(self, split: str) -> list[int]:
        """Return the number of each file's subfolder, in sorted order of their names."""
        if self.is_database:
            raise ValueError(
                f"data.source.path={self.root}: a database has one class; a class-conditional model"
                " needs images with labels"
            )
        names = sorted({f.parent for f in self.files})
        if self.root in names:
            raise ValueError(
                f"data.source.path={self.root}: a class-conditional model needs one subfolder for"
                " each class, and no image beside them"
            )
        return [names.index(f.parent) for f in self._of(split)]


def pictures_in(path: Path) -> tuple[list[Path], list[str]]:
    """Return the picture files of a folder in sorted order, and lines on what is left out.

    A run and `sample` draw `grid.png` beside their images: it shows many, and is none of them.

    Raises:
        ValueError: if it holds no image, or is a database.
    """
    folder = Folder(str(path))
    if folder.is_database:
        raise ValueError(f"{path}: is a database; write its pictures as files")

    pictures = [file for file in folder.files if file.name != GRID]
    grids = len(folder.files) - len(pictures)
    if not pictures:
        raise ValueError(f"{path}: holds no picture but {GRID}, which shows many side by side")
    drawn = [f"{path}: {grids} {GRID} left out, which shows many images side by side"] * (grids > 0)
    return pictures, [*folder.notes, *drawn]


def _of_a_program(folder: str) -> bool:
    """Return whether a folder's name says that nobody put images there: `.ipynb_checkpoints`."""
    return folder.startswith(".") or folder in ("__MACOSX", "@eaDir")


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ValueError(
            f"{file}: can't be read ({error.strerror}); replace or remove it"
        ) from error
