"""Refusals: parts of a command that could not be done, while the others could.

A command that draws several things draws all that it can, then names in a line each what it refused
and why. What was refused keeps the files that it had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ERRORS = (ValueError, OSError, FloatingPointError)  # a user's mistake, or damaged files


class Refusals:
    """What was refused so far, a line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Note the refusal of a part, and go on after it.

        A folder that another command works in is no refusal: that ends the whole command.

        Args:
            name: of the part, such as `table3`.
        """
        try:
            yield
        except BlockingIOError:
            raise
        except ERRORS as error:
            self.add(name, error)

    def add(self, name: str, error: BaseException | str) -> None:
        """Note a refusal, once; its message may have line breaks of its own."""
        line = f"{name}: " + " ".join(line.strip() for line in str(error).splitlines())
        if line not in self.lines:
            self.lines.append(line)

    def show(self) -> None:
        """Print all of them to the standard error, after everything else; nothing for none."""
        for line in self.lines:
            print(f"error: {line}", file=sys.stderr, flush=True)
