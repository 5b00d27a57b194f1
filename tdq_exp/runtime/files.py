"""Rows, and the fingerprints that say what they are rows of.

A fingerprint is the hash of *parts*: the plain values that a stage's result depends on. Stages build on each other,
fit < sample < measure, and the upstream fingerprint is one of the downstream parts. Paths are never parts: the hash of
what they hold is. The same fingerprint means "already done"; another one under the same name is refused, with the
difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]


def fingerprint(parts: Parts) -> str:
    """First 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to do this stage again") from error


def write(path: Path, content: Any) -> None:
    """Writes JSON beside the target and renames it.

    Raises:
        OSError: naming the file, if the folder can't be written or is full.
    """
    part = path.with_suffix(f"{path.suffix}.{os.getpid()}.part")  # caches are shared by runs that go on side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror}); free space or set out=FOLDER") from error
