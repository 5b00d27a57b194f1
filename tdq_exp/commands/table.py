"""Fill a table of the paper from the rows of finished runs.

examples:
  python -m tdq_exp table table1 --scale digits          render from the rows that are there
  python -m tdq_exp table table1 --scale digits --run    first run every cell that has no row
  python -m tdq_exp table table1 --scale small --run data.source.path=~/cifar10
  python -m tdq_exp table table1 --scale small --run --column ldm    only the cells of one column
  python -m tdq_exp table table1 --run --share 3/8       the third of eight jobs side by side
  python -m tdq_exp table all --scale small              render every table of the scale
To go on after an interruption, run the same command again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli, table_runs
from tdq_exp.config import assets
from tdq_exp.report import cells as cells_module
from tdq_exp.report import charts, columns, text_tables
from tdq_exp.report import manifest as manifests
from tdq_exp.report.cells import Cell
from tdq_exp.report.column_notes import options_of
from tdq_exp.report.contents import require_given
from tdq_exp.report.costs import read_costs
from tdq_exp.report.manifest import Manifest
from tdq_exp.runtime.progress import console, print_table
from tdq_exp.runtime.refusals import Refusals

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if a cell failed, 2 for a user's mistake or rows that do not compare.
    """
    options = parse(arguments)
    return cli.exit_code(make_all if options.table == ALL else make, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    return _parser().parse_intermixed_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "python -m tdq_exp table")

    # Which table, and its cells.
    parser.add_argument("table", help="a file of configs/table: table1 to table10, or all")
    parser.add_argument(
        "overrides", nargs="*", help="added to every cell's command, as data.source.path=PATH"
    )

    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")
    parser.add_argument(
        "--run",
        action="store_true",
        help="print the plan, run the cells that have no row, then render",
    )
    parser.add_argument(
        "--column", help="run the cells of this column alone: ddim, ldm (default: all of the scale)"
    )
    parser.add_argument(
        "--share",
        type=share,
        metavar="K/N",
        help="with --run: the K-th of N shares of the table's runs, for jobs side by side, such as"
        " the tasks of a SLURM array (scripts/cluster)",
    )
    parser.add_argument(
        "--go", action="store_true", help="run the paper's scale although there is no GPU"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of runs and tables (default: results)",
    )

    return parser


def share(text: str) -> tuple[int, int]:
    """Return (K, N) of `K/N`.

    Raises:
        argparse.ArgumentTypeError: unless 1 <= K <= N.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: K/N with K from 1 to N, such as 3/8")
    return int(number), int(count)


def make_all(options: argparse.Namespace, refusals: Refusals | None = None) -> int:
    """Make every table of a scale that has the column, in order; see `make`.

    A table whose rows do not compare keeps no other from being made. One without any row is not
    written, unless it is to be run.

    Args:
        options: of the command.
        refusals: where such tables are noted, for a caller that shows them; else they are shown.

    Returns:
        The exit code: 1 if a cell failed, 2 if a table was refused.

    Raises:
        ValueError: before the first one is made, if one of them refuses its options.
    """
    noted = Refusals() if refusals is None else refusals
    _require_options(options)

    manifest_of = {name: manifests.read_manifest(name) for name in names(options.scale)}
    columns_of = {name: manifest.at(options.scale) for name, manifest in manifest_of.items()}
    having = [name for name in columns_of if options.column in (None, *columns_of[name])]

    # A column that no table has is refused as by the first one.
    chosen = having or list(manifest_of)[:1]
    asked = {
        name: cells_module.cells_of(
            manifest_of[name],
            options.scale,
            options.out.expanduser(),
            options.overrides,
            options.column,
        )
        for name in chosen
    }

    code = 0
    for name, cells in asked.items():
        with noted.of(name):
            if not options.run and not any(cells_module.find(cell).row for cell in cells):
                _tell_empty(name, options)
                continue
            code = max(code, make(argparse.Namespace(**{**vars(options), "table": name})))

    if refusals is None:
        noted.show()
    return cli.MISTAKE if noted.lines else code


def _tell_empty(name: str, options: argparse.Namespace) -> None:
    """Say that a table has no row, and that one which lies there is of rows that are gone."""
    file = options.out.expanduser() / "tables" / f"{name}-{options.scale}.md"
    old = f"; {file} is of rows that are gone, remove it" if file.exists() else ""
    line = f"{name} has no row at scale {options.scale} yet: not written{old}"
    console.print(line)


def names(scale: str) -> list[str]:
    """Return the names of all tables that a scale has, by number; of all if it has none."""
    found = (path.stem for path in (assets.configs() / "table").glob("table*.yaml"))
    ordered = sorted(found, key=lambda name: (len(name), name))
    return [name for name in ordered if manifests.read_manifest(name).at(scale)] or ordered


def make(options: argparse.Namespace) -> int:
    """Run what is missing, if asked to, then write and print the table.

    Returns:
        The exit code: 1 if a cell failed.
    """
    _require_options(options)
    manifest = manifests.read_manifest(options.table)
    out = options.out.expanduser()

    # 1. What the table asks for, and the rows that there are.
    asked = cells_module.cells_of(manifest, options.scale, out, options.overrides, options.column)
    cells = [cells_module.find(cell) for cell in asked]

    # 2. The rows that there are not.
    failed: list[str] = []
    if options.run:
        mine = [cell for cell in cells if options.column in (None, cell.column)]
        if options.share is not None:
            mine = table_runs.share_of(mine, *options.share)
        failed = table_runs.run(mine, options.go)
        cells = [cells_module.find(cell) for cell in asked]

    # 3. The table and its picture.
    for cell in cells:
        if cell.changes:
            console.print(f"stale {cell.name}: {'; '.join(cell.changes)}")

    footer = cells_module.in_footer(options.overrides)
    if footer and options.column is not None:
        footer.append(f"in the column {options.column} alone")
    costs = read_costs(out / manifest.measured if manifest.measured else None)
    table = columns.text_table(manifest, options.scale, cells, footer, costs)
    tables = text_tables.write(table, out / "tables" / f"{manifest.name}-{options.scale}")
    figures = draw(manifest, options.scale, cells, out / "figures")

    print_table(table.title, [" ".join(header).strip() for header in table.headers], table.lines)
    for path in tables:
        console.print(f"table    {path}")
    for path in figures:
        console.print(f"figure    {path}")
    if failed:
        console.print(f"failed   {', '.join(failed)}: see above")

    return cli.FAILED if failed else 0


def _require_options(options: argparse.Namespace) -> None:
    """Refuse options that go with no table.

    Raises:
        ValueError: naming the option.
    """
    if options.share is not None and not options.run:
        raise ValueError("--share: says which runs --run starts; add --run")
    cli.require_results(options.out.expanduser(), is_read=not options.run)
    require_given(options.overrides)


def draw(manifest: Manifest, scale: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Draw the distances over the activations' bits, a panel for each column.

    Returns:
        The picture; nothing if the table has none, or no rows for it.
    """
    if manifest.plot_weight_bits is None:
        return []

    panels = []
    for name in manifest.at(scale):
        of_column = [cell for cell in cells if cell.column == name]
        methods, floor = columns.over_bits(manifest, of_column)
        if methods:
            title = (
                f"{columns.model_label(of_column)}, weights at {manifest.plot_weight_bits} bits,"
                f" plan {options_of(of_column, 'plan')}"
            )
            panels.append(charts.Panel(title, columns.distance_name(of_column), methods, floor))
    if not panels:
        return []

    path = folder / f"{manifest.name}-{scale}.png"
    charts.distance_over_bits(panels, path, f"{manifest.title}, scale {scale}")
    return [path]
