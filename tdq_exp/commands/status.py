"""Say of every cell of tables and figures: done, running, half done, failed, stale or missing.

python -m tdq_exp status                          all tables and figures at the paper's scale
python -m tdq_exp status table1 --scale small     one table
python -m tdq_exp status --scale small --all      also the cells that are done
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdq_exp.commands import cli
from tdq_exp.commands.table import names
from tdq_exp.experiment.cost import duration
from tdq_exp.report import cells as report_cells
from tdq_exp.report.cell_states import DONE, STATES, CellState, seconds_left, state_of
from tdq_exp.report.figure_manifest import FigureManifest, cells_of_figure, read_figure
from tdq_exp.report.figure_manifest import names as figure_names
from tdq_exp.report.figure_numbers import FLOAT, line_label, numbers_file
from tdq_exp.report.manifest import read_manifest
from tdq_exp.runtime import files
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
        tables: names of manifests; empty for all, and for all figures.
        scale: of the cells.
        out: folder of results.
        every: list the cells that are done, too.

    Raises:
        ValueError: for a table or a scale that does not exist, or a damaged record.
    """
    cli.require_results(out)
    asked = {
        table: report_cells.cells_of(read_manifest(table), scale, out)
        for table in tables or names(scale)
    }
    figures = [] if tables else [read_figure(name) for name in figure_names()]
    for figure in figures:
        if figure.is_from_rows:
            asked[figure.name] = cells_of_figure(figure, scale, out)

    # A cell that stands in several tables is one run.
    cells = {cell.key: cell for of_one in asked.values() for cell in of_one}
    states = {key: state_of(report_cells.find(cell)) for key, cell in cells.items()}

    left = seconds_left(list(states.values()))

    listed = [s for s in states.values() if every or s.state != DONE]
    if listed:
        print_table(
            f"cells at scale {scale}" + ("" if every else ", but for those that are done"),
            ["cell", "state", "time left", "where, or why"],
            [[s.cell.name, s.state, _left_text(s, left), s.detail] for s in listed],
        )

    print_table(
        "tables" if tables else "tables, and figures that are drawn from rows",
        ["table", "cells", *STATES],
        [_counted(name, [states[cell.key] for cell in of_one]) for name, of_one in asked.items()],
    )
    if figures:
        print_table(
            "figures that are measured on networks",
            ["figure", "lines", "missing"],
            [_measured(figure, scale, out) for figure in figures if not figure.is_from_rows],
        )

    known = [seconds for seconds in left.values() if seconds is not None]
    unknown = len(left) - len(known)
    text = f"about {duration(sum(known))} one after the other" if known or not left else "unknown"
    text += f"; {unknown} cells without a measured run of their model" if unknown else ""
    console.print(f"time left: {text}")


def _measured(figure: FigureManifest, scale: str, out: Path) -> list[str]:
    """Return a figure's name, and how many lines of networks have numbers and which have none."""
    cells = cells_of_figure(figure, scale, out)
    wanted = {(cell.column, line_label(cell)): cell.run for cell in cells}
    record = files.read_json(numbers_file(figure.name, scale, out), needs=["columns"])
    if record is None:
        command = f"python -m tdq_exp figure {figure.name} --scale {scale} --run"
        return [figure.name, f"0 of {len(wanted)}", f"all: {command}"]

    missing = [
        f"{column}: {label}"
        for (column, label), run in wanted.items()
        if not _has_numbers(record["columns"].get(column), label, run)
    ]
    return [figure.name, f"{len(wanted) - len(missing)} of {len(wanted)}", "; ".join(missing)]


def _has_numbers(column: Mapping[str, Any] | None, label: str, run: str) -> bool:
    """Return whether a figure's column has the numbers of a line, of the run that it asks for.

    A figure of the float model alone, and one of step sizes, name no run of it.
    """
    if column is None or label in column["missing"]:
        return False
    runs = column.get("runs")
    return (
        not runs or (label == FLOAT and label not in runs) or runs.get(label, {}).get("run") == run
    )


def _left_text(state: CellState, left: dict[str, float | None]) -> str:
    seconds = left.get(state.cell.key)
    return "-" if seconds is None else duration(seconds)


def _counted(table: str, states: Sequence[CellState]) -> list[str]:
    counts = Counter(state.state for state in states)
    return [table, str(len(states)), *(str(counts[state]) for state in STATES)]
