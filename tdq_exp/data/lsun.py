"""LSUN in the files of its authors: an LMDB whose values are encoded images. Needs `lmdb`.

Source: Yu et al., *LSUN*, arXiv 1506.03365; https://github.com/fyu/lsun.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def is_lmdb(folder: Path) -> bool:
    """Return whether a folder is an LMDB."""
    return (folder / "data.mdb").is_file()


def open_lmdb(folder: Path) -> Any:
    """Return the database, opened for reading; nothing is written beside it.

    Raises:
        ValueError: if the package `lmdb` is not there, or the database is damaged.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            f"data.source.path={folder}: is an LMDB, which needs a package: pip install lmdb; or"
            " convert it to files with LSUN's own `python data.py export FOLDER --out_dir FILES"
            " --flat`, and give FILES (they are WebP: rename them to *.webp)"
        ) from error

    try:
        return lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, meminit=False, max_readers=1
        )
    except lmdb.Error as error:
        raise ValueError(f"data.source.path={folder}: a damaged LMDB ({error})") from error


def values(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (key, encoded image) in the order of the keys."""
    with open_lmdb(folder) as database, database.begin() as transaction:
        for key, value in transaction.cursor():
            yield bytes(key).decode("latin1"), bytes(value)


def count(folder: Path) -> int:
    """Return the number of images."""
    with open_lmdb(folder) as database:
        return int(database.stat()["entries"])
