"""Paths of weights, as a user or a record gives them."""

from __future__ import annotations

from pathlib import Path

from tdq_exp.models.weights.inert_pickle import CheckpointError
from tdq_exp.runtime import files


def expanded(source: str) -> Path:
    """Return a source as a path, `~` replaced."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{source}: {error}") from error


def require_file(path: Path) -> None:
    """Refuse a pipe or a device, which would be read for ever."""
    try:
        files.require_regular(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
