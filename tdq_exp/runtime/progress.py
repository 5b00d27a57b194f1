"""Progress of long work on the terminal, with time left: the only importer of rich.

On a terminal a live bar; into a file or a pipe a line every half minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tdq_exp.runtime import signals

WIDE = 200  # columns of a table in a file or a pipe

# Paths and values may hold brackets or :names:, which would be read as markup or drawn as pictures.
console = Console(
    markup=False,
    emoji=False,
    highlight=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() else WIDE,
)
SECONDS = 30.0  # between two lines where there is no terminal
Advance = Callable[[str], None]


@contextmanager
def track(label: str, total: int, start: int = 0, show: bool = True) -> Iterator[Advance]:
    """Count from `start` to `total`: call what is yielded once per unit, with a short remark.

    A unit is also where a signal that has arrived stops the work, unless it is held back.

    Args:
        label: what is being done.
        total: number of units.
        start: units that an earlier run has done.
        show: False on all processes but one.
    """
    if not show:
        yield _unseen
        return

    # On a terminal: a bar.
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )

        with Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=console,
        ) as bar:
            task = bar.add_task(label, total=total, completed=start, remark="")

            def move(remark: str) -> None:
                bar.update(task, advance=1, remark=remark)
                signals.check()

            yield move
        return

    # In a log: a line now and then.
    began = printed = time.monotonic()
    done = start

    def advance(remark: str) -> None:
        nonlocal done, printed
        done += 1

        now = time.monotonic()
        if now - printed >= SECONDS or done == total:
            printed = now
            left = (now - began) / max(done - start, 1) * (total - done)
            console.print(
                f"{label} {done}/{total}, {now - began:.0f} s, {left:.0f} s left, {remark}"
            )
        signals.check()

    yield advance


def _unseen(remark: str) -> None:
    signals.check()


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a small table; numbers with four digits and to the right, None as "-"."""
    texts = [[_cell(value) for value in row] for row in rows]

    table = Table(title=title, title_justify="left")
    for column, header in enumerate(headers):
        words = any(_is_words(row[column]) for row in texts)
        table.add_column(
            header, justify="left" if words or not column else "right", overflow="fold"
        )
    for row in texts:
        table.add_row(*row)
    console.print(table)


def _is_words(text: str) -> bool:
    """Return whether a cell is read, not compared: `missing` and `-` stand for a number."""
    return text[:1].isalpha() and text != "missing"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
