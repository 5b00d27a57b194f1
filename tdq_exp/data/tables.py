"""Data sets of the hub, or local ones of the same layout: the only importer of `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tdq_exp.data import cifar, lsun
from tdq_exp.data.decode import decode_cell, first_line
from tdq_exp.data.holdout import HOLDOUT, check_holdout, part
from tdq_exp.runtime import hub

SPLITS = ("train", "validation")


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
            check_holdout(holdout)
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
            if not self._told_to_hold_out:  # for want of this split; another may be there
                name += f", without {self._split['validation']}"
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
        return images if self._holdout is None else part(images, self._holdout, split)

    def labels(self, split: str) -> list[int]:
        whole = split if self._holdout is None else "train"
        if self._cifar is not None:
            labels = cifar.read_labels(self._cifar[0], self._cifar_part(whole))
        else:
            labels = self._table_labels(whole)
        return labels if self._holdout is None else list(part(iter(labels), self._holdout, split))

    def _cifar_part(self, split: str) -> tuple[str, ...]:
        """Return the files of a split of CIFAR as torchvision unpacks it."""
        assert self._cifar is not None
        folder, splits = self._cifar
        name = self._split[split]
        if name not in splits:
            raise ValueError(
                f"data.source.{split}={name}: {folder} has the splits {', '.join(splits)}"
            )
        return splits[name]

    def _read_cifar(self, split: str) -> Iterator[Image.Image]:
        assert self._cifar is not None
        return cifar.read_split(self._cifar[0], self._cifar_part(split))

    def _table(self, split: str) -> Any:
        """Return the table of a split.

        Raises:
            ValueError: if it can't be read, naming the path.
        """
        import datasets

        if self._local is None:
            hub.prepare()
        try:
            return datasets.load_dataset(self._name, split=self._split[split])
        except ValueError as error:
            raise ValueError(
                f"data.source.path={self.path}: {first_line(error)}; name the splits with"
                " data.source.train and data.source.validation, or hold some of the first out with"
                f" data.source.holdout={HOLDOUT}"
            ) from error
        except Exception as error:  # its own types for broken files, requests' for the network
            raise self._unreadable(error) from error

    def _read_table(self, split: str) -> Iterator[Image.Image]:
        import datasets

        table = self._table(split)

        # Bytes are decoded here, so that an error can name the image.
        column = self.column or _image_column(table.features, self.path)
        table = table.cast_column(column, datasets.Image(decode=False))

        for i, row in enumerate(table):
            cell = row[column]
            file = f" ({cell['path']})" if cell.get("path") else ""
            yield decode_cell(cell, f"{self.path}[{self._split[split]}][{i}]{file}")

    def _table_labels(self, split: str) -> list[int]:
        table = self._table(split)
        columns = [n for n, kind in table.features.items() if type(kind).__name__ == "ClassLabel"]
        if len(columns) != 1:
            raise ValueError(
                f"data.source.path={self.path}: has {len(columns)} columns of class labels;"
                " a class-conditional model needs one"
            )
        return [int(c) for c in table[columns[0]]]


def _image_column(features: Any, path: str) -> str:
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(found) != 1:
        raise ValueError(
            f"data.source.column: {path} has {len(found)} image columns"
            f" ({', '.join(features)}); name one"
        )
    return str(found[0])
