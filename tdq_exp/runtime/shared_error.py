"""Errors that every process of a run ends with: one process prints the line, the others nothing.

Whoever raises such an error on all processes notes on it, in each, whether another process prints
it; the exit of the command asks. An error without a note belongs to one process, which prints it.
"""

from __future__ import annotations

_NOTE = "_printed_by_another_process"


def share(error: BaseException, printed: bool) -> None:
    """Note on an error that every process of the run ends with it.

    Args:
        error: in this process.
        printed: whether another process prints it.
    """
    setattr(error, _NOTE, printed)


def is_shared(error: BaseException) -> bool:
    """Return whether every process of the run ends with this error."""
    return hasattr(error, _NOTE)


def is_printed(error: BaseException) -> bool:
    """Return whether another process prints this error."""
    return bool(getattr(error, _NOTE, False))
