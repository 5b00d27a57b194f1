"""Why a run failed, as a file of its folder: `failed.json`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tdq_exp.runtime import files

NAME = "failed.json"


class AnotherResultError(ValueError):
    """A folder holds another result than a command asks for, which is refused; nothing failed."""


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Write an error that leaves the `with` block to `failed.json`; on success remove the file.

    No folder is created for this. A locked folder, or one that holds the result of another
    configuration, does not count as a failure.

    Args:
        folder: of the run.
    """
    try:
        yield
    except (BlockingIOError, AnotherResultError):
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        note = {
            "error": f"{type(error).__name__}: {line}",
            "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        if folder.is_dir():
            with suppress(OSError):  # a full disk may be the very reason
                files.write_json(folder / NAME, note)
        raise

    (folder / NAME).unlink(missing_ok=True)


def failure(folder: Path) -> str | None:
    """Return why the last run in a folder failed, or None."""
    note = files.read_json(folder / NAME)
    return None if note is None else f"{note['error']} ({note['when']})"
