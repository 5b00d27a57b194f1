"""Say of every cell of the tables: done, running, half done, failed, stale or missing.

python -m tdq_exp status                          all tables at the paper's scale
python -m tdq_exp status table1 --scale small     one table
python -m tdq_exp status --scale small --all      also the cells that are done
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.commands.table import names
from tdq_exp.experiment.cost import duration
from tdq_exp.report import cells as report_cells
from tdq_exp.report.cell_states import DONE, STATES, CellState, seconds_left, state_of
from tdq_exp.report.manifest import read_manifest
from tdq_exp.runtime.progress import console, print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp status")
    parser.add_argument("tables", nargs="*", help="files of configs/table (default: all)")
    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")
    parser.add_argument("--all", action="store_true", help="also list the cells that are done")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of results (default: results)"
    )
    options = parser.parse_args(arguments)
    return cli.exit_code(show, options.tables, options.scale, options.out.expanduser(), options.all)


def show(tables: Sequence[str], scale: str, out: Path, every: bool = False) -> None:
    """Print the state of each cell of some tables, and how much time is left.

    Args:
        tables: names of manifests; empty for all.
        scale: of the cells.
        out: folder of results.
        every: list the cells that are done, too.

    Raises:
        ValueError: for a table or a scale that does not exist, or a damaged record.
    """
    cli.require_results(out)
    states: dict[str, CellState] = {}
    of_table: dict[str, list[str]] = {}

    # A cell that stands in several tables is one run.
    for table in tables or names(scale):
        manifest = read_manifest(table)
        cells = report_cells.cells_of(manifest, scale, out)
        of_table[table] = [cell.key for cell in cells]
        for cell in cells:
            if cell.key not in states:
                states[cell.key] = state_of(report_cells.find(cell))

    left = seconds_left(list(states.values()))

    listed = [s for s in states.values() if every or s.state != DONE]
    if listed:
        print_table(
            f"cells at scale {scale}" + ("" if every else ", but for those that are done"),
            ["cell", "state", "time left", "where, or why"],
            [[s.cell.name, s.state, _left_text(s, left), s.detail] for s in listed],
        )

    print_table(
        "tables",
        ["table", "cells", *STATES],
        [_counted(table, [states[key] for key in keys]) for table, keys in of_table.items()],
    )

    known = [seconds for seconds in left.values() if seconds is not None]
    unknown = len(left) - len(known)
    text = f"about {duration(sum(known))} one after the other" if known or not left else "unknown"
    text += f"; {unknown} cells without a measured run of their model" if unknown else ""
    console.print(f"time left: {text}")


def _left_text(state: CellState, left: dict[str, float | None]) -> str:
    seconds = left.get(state.cell.key)
    return "-" if seconds is None else duration(seconds)


def _counted(table: str, states: Sequence[CellState]) -> list[str]:
    counts = Counter(state.state for state in states)
    return [table, str(len(states)), *(str(counts[state]) for state in STATES)]
