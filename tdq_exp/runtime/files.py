"""Files of a run: JSON, fingerprints, and the one way in which a file is replaced.

A fingerprint is the hash of *parts*: the plain values that a stage's result depends on. Stages
build on each other, fit < sample < measure, and the upstream fingerprint is one of the downstream
parts. Paths are never parts: the hash of what they hold is. The same fingerprint means "already
done"; another one under the same name is refused, with the difference.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]

REMEDY = "free space or set out=FOLDER"
ABANDONED = 24 * 3600.0  # seconds after which a part file belongs to no living run


def fingerprint(parts: Parts) -> str:
    """Return the first 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@contextmanager
def replacing(path: Path, remedy: str = REMEDY, keep_other: bool = False) -> Iterator[Path]:
    """Write a file beside its target and rename it: a reader finds the whole file or none.

    After an error the target is as it was, and nothing is left beside it.

    Args:
        path: the target; its folder is made if need be.
        remedy: what the message of an error says to do.
        keep_other: if the target exists by the time the new file is finished, keep the target.

    Yields:
        The file to write. Its name is unique, so that runs beside this one can write the same
        target.

    Raises:
        OSError: naming the target, if the folder can't be written or is full.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)

        yield part

        if not (keep_other and path.exists()):
            os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise OSError(f"{path}: can't be written ({reason}); {remedy}") from error
    finally:
        part.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed runs left beside a target: part files that were not written for a day."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):  # another run removes it, too
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def require_regular(path: Path) -> None:
    """Refuse to read what is there but is no file: a pipe would wait for ever, a device never end.

    Raises:
        ValueError: naming the path. What is missing is left to whoever opens it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
            raise ValueError(f"{path}: is {kind}, where a file is wanted")


def require_folder(path: Path, key: str) -> None:
    """Refuse a folder that can't be made: something else has its name, or it can't be written to.

    Nothing is made.

    Args:
        path: the folder.
        key: of the configuration, for the message.

    Raises:
        OSError: naming key and path.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent

    if not there.is_dir():
        raise OSError(f"{key}={path}: {there} is no folder; name another")
    try:
        tempfile.TemporaryFile(dir=there).close()  # it has no name: nothing is left
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(
            f"{key}={path}: {there} can't be written to ({reason}); name another folder"
        ) from error


def write_bytes(path: Path, content: bytes, remedy: str = REMEDY) -> None:
    """Replace a file in one step. See `replacing`."""
    with replacing(path, remedy) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str, remedy: str = REMEDY) -> None:
    """Replace a text file, UTF-8, in one step. See `replacing`."""
    write_bytes(path, content.encode(), remedy)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, its keys sorted. See `replacing`."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    require_regular(path)
    try:
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets without end
        raise ValueError(f"{path}: damaged ({error}); remove it to do this stage again") from error

    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(
            f"{path}: damaged (a {kind} in place of an object); remove it to do this stage again"
        )
    return content
