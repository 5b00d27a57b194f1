"""Draw a figure of the paper from measured numbers, and measure them first if asked to.

examples:
  python -m tdq_exp figure 3 --scale digits          draw from results/numbers/figure3-digits.json
  python -m tdq_exp figure 3 --scale digits --run    measure first, and train what is missing
  python -m tdq_exp figure 3 --scale small --measure    measure the networks that there are
  python -m tdq_exp figure 8 --scale small --run     run the cells that have no row, then draw
  python -m tdq_exp figure all --scale small         draw everything that has numbers

Figures: 2, 3, 8, 9, grids (Figures 5 to 7), layers, length, encoding. The same numbers give the
same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdq_exp.commands import cli, figure_data, table_runs
from tdq_exp.report import cells as cells_module
from tdq_exp.report import drawings, figure_manifest, figure_numbers
from tdq_exp.report.contents import require_given
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.report.manifest import read_manifest
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.refusals import Refusals

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a cell failed, 2 for a user's mistake or a figure that was refused.
    """
    return cli.exit_code(make, parse(arguments))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    return _parser().parse_intermixed_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "python -m tdq_exp figure")

    # Which figure, of which networks.
    parser.add_argument("figure", help=f"one of {', '.join(figure_manifest.names())}, or {ALL}")
    parser.add_argument(
        "overrides", nargs="*", help="added to every run's command, as data.source.path=PATH"
    )
    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")

    # What may be computed.
    parser.add_argument(
        "--run",
        action="store_true",
        help="measure what has not been measured yet, and train missing networks for it",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure again on existing networks, without training any",
    )
    parser.add_argument(
        "--go", action="store_true", help="run the paper's scale although there is no GPU"
    )

    # Where things lie.
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of runs and figures (default: results)",
    )
    parser.add_argument(
        "--nets",
        type=Path,
        help="additional folder of runs: networks are looked up here, and newly trained ones saved"
        " here (default: the folder `nets` of --out)",
    )
    return parser


def make(options: argparse.Namespace, refusals: Refusals | None = None) -> int:
    """Measure what is asked for, then draw.

    With `all`, a figure that is refused does not keep the others from being drawn.

    Args:
        options: of the command.
        refusals: where such figures are noted, for a caller that shows them; else they are shown.

    Returns:
        The exit code: 1 if a cell failed, 2 if one of all figures was refused.

    Raises:
        ValueError: for a single figure that is refused, or options that go with no figure.
    """
    out = options.out.expanduser()
    cli.require_results(out)
    require_given(options.overrides)
    options.nets = (options.nets or out / "nets").expanduser()
    scales = read_manifest("table1").scales
    if options.scale not in scales:
        raise ValueError(f"--scale {options.scale}: choose one of {', '.join(scales)}")

    if options.figure != ALL:
        failed = _make_one(figure_manifest.read_figure(options.figure), out, options)
        return cli.FAILED if failed else 0

    noted = Refusals() if refusals is None else refusals
    failed = False
    for name in figure_manifest.names():
        with noted.of(name):
            figure = figure_manifest.read_figure(name)
            if _has_numbers(figure, out, options):
                failed = _make_one(figure, out, options) or failed
            else:
                console.print(f"{name} has no numbers yet: add --run")

    if refusals is None:
        noted.show()
    return cli.MISTAKE if noted.lines else cli.FAILED if failed else 0


def _has_numbers(figure: FigureManifest, out: Path, options: argparse.Namespace) -> bool:
    """Return whether a figure can be drawn, or may be measured: else it is left out of `all`."""
    if options.run or options.measure:
        return True
    file = figure_numbers.numbers_file(figure.name, options.scale, out)
    return file.exists() or _has_rows(figure, out, options)


def _make_one(figure: FigureManifest, out: Path, options: argparse.Namespace) -> bool:
    """Make one figure; return whether a cell failed."""
    file = figure_numbers.numbers_file(figure.name, options.scale, out)
    failed: list[str] = []

    # 1. The numbers.
    if figure.is_from_rows:
        cells, failed = _rows(figure, out, options)
        figure_numbers.write(file, figure_numbers.distances(figure, options.scale, cells))
    elif options.measure or (options.run and not file.exists()):
        cells = figure_manifest.cells_of_figure(figure, options.scale, out, options.overrides)
        found = [cells_module.find(cell) for cell in cells]
        figure_numbers.write(file, figure_data.measure(figure, options.scale, found, options))
    elif changed := cells_module.in_footer(options.overrides):
        raise ValueError(
            f"{' '.join(changed)}: {file} may be measured without; add --measure, or leave it out"
        )

    record = files.read_json(file)
    if record is None:
        raise ValueError(
            f"{figure.name} at scale {options.scale} was not measured yet: add --run (it would"
            f" write {file})"
        )

    # 2. The picture, of no other networks than the manifest names today.
    asked = figure_manifest.cells_of_figure(figure, options.scale, out, options.overrides)
    figure_numbers.require_asked(file, record, asked)
    if not figure.is_from_rows:  # which lists its missing rows with their commands
        _tell_missing(record)
    path = drawings.draw(figure, record, out / "figures" / f"{file.stem}.png")
    console.print(f"numbers   {file}")
    console.print(f"figure    {path}")
    return bool(failed)


def _rows(
    figure: FigureManifest, out: Path, options: argparse.Namespace
) -> tuple[list[cells_module.Cell], list[str]]:
    """Return the cells of a figure that is drawn from rows, and the names of those that failed."""
    asked = figure_manifest.cells_of_figure(figure, options.scale, out, options.overrides)
    cells = [cells_module.find(cell) for cell in asked]
    if not options.run:
        table_runs.show_missing(cells)
        return cells, []

    failed = table_runs.run(cells, options.go)
    return [cells_module.find(cell) for cell in asked], failed


def _has_rows(figure: FigureManifest, out: Path, options: argparse.Namespace) -> bool:
    """Return whether there are rows to draw a figure from that needs no other numbers."""
    if not figure.is_from_rows:
        return False
    asked = figure_manifest.cells_of_figure(figure, options.scale, out, options.overrides)
    found = [cells_module.find(cell) for cell in asked]
    return figure_numbers.has_curve(figure_numbers.distances(figure, options.scale, found))


def _tell_missing(record: dict[str, Any]) -> None:
    for name, column in record["columns"].items():
        if column["missing"]:
            console.print(f"{name}: missing {'; '.join(column['missing'])}")
