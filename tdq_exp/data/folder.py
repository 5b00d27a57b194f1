"""A folder of image files, or of a database of LSUN, as a source of images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from tdq_exp.data import cifar, lsun
from tdq_exp.data.decode import decode, decode_cell
from tdq_exp.data.holdout import HOLDOUT, check_holdout, part_of


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
        check_holdout(holdout)

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
        return list(part_of(iter(self._files), self.holdout, split))

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
            for key, raw in part_of(lsun.values(self.root), self.holdout, split):
                yield decode(raw, f"{self.root}[{key}]")
            return
        for file in self._of(split):
            yield decode_cell({"bytes": None, "path": str(file)}, str(file))

    def labels(self, split: str) -> list[int]:
        """Return the number of each file's subfolder, in sorted order of their names."""
        if self._database:
            raise ValueError(f"data.source.path={self.root}: an LMDB of LSUN names no classes")
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
