"""Check a results folder: checksums, seals, and that records, rows and images belong together.

python -m tdq_exp verify                                        everything in results/
python -m tdq_exp verify results/runs/digits_w4a4_lsq_tdq/seed0
python -m tdq_exp verify table1 --scale small                   the rows of a table, and its file
A line for each fault; the exit code is 1 if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.config import assets
from tdq_exp.experiment import record_checks as checks
from tdq_exp.runtime.progress import console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if there are faults, 2 for a user's mistake.
    """
    parser = cli.parser(__doc__, "python -m tdq_exp verify")
    parser.add_argument(
        "what",
        nargs="?",
        default="results",
        help="a run, a folder, a file, or a table of configs/table (default: results)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of a table's runs"
    )
    parser.add_argument("--scale", help="scale of a table: paper, small or digits (default: all)")
    options = parser.parse_args(arguments)

    return cli.exit_code(verify, options.what, options.out.expanduser(), options.scale)


def verify(what: str, out: Path, scale: str | None = None) -> int:
    """Print the faults of a run, a folder, a file or a table, and return the exit code.

    Args:
        what: a path, or a table's name.
        out: folder of a table's runs.
        scale: of a table; None for all.

    Raises:
        ValueError: if there is nothing of that name, or a scale of what has none.
    """
    if not what.strip():
        raise ValueError("verify: name a run, a folder, a file or a table")
    path = Path(what).expanduser()
    tables = {file.stem for file in (assets.configs() / "table").glob("*.yaml")}

    is_table = what in tables and not path.exists()
    if scale is not None and not is_table:
        raise ValueError(f"--scale {scale}: is for tables only, and {what} is not a table")
    faults, runs = table_faults(what, out, scale) if is_table else (checks.faults_of(path), None)

    for fault in faults:
        console.print(fault)
    looked_at = "" if runs is None else f", {runs} runs are there"
    result = f"{len(faults)} faults" if faults else "whole"
    console.print(f"{what}: {result}{looked_at}")
    return 1 if faults else 0


def table_faults(name: str, out: Path, only: str | None = None) -> tuple[list[str], int]:
    """Return what is wrong with the runs of a table and its files, and how many runs there are.

    Args:
        name: of the table.
        out: folder of results.
        only: the scale that is looked at; None for all of the table's.

    Raises:
        ValueError: for a scale that the table lacks.
    """
    from tdq_exp.report import cells, columns, manifest, text_tables
    from tdq_exp.report.costs import read_costs

    table = manifest.read_manifest(name)
    if only is not None and only not in table.scales:
        raise ValueError(f"--scale {only}: {name} has {', '.join(table.scales)}")
    found: list[str] = []
    runs = 0
    for scale in table.scales if only is None else [only]:
        asked = cells.cells_of(table, scale, out)

        # 1. The runs.
        folders = sorted({cell.folder for cell in asked if cell.folder.exists()})
        here = [fault for folder in folders for fault in checks.run_faults(folder)]
        found += here
        runs += len(folders)

        # 2. The rendered file, which is what the rows give.
        file = out / "tables" / f"{name}-{scale}.md"
        if not here and file.exists():
            rows = [cells.find(cell) for cell in asked]
            costs = read_costs(out / table.measured if table.measured else None)
            wanted = columns.text_table(table, scale, rows, [], costs)
            if file.read_text() != text_tables.markdown(wanted):
                found.append(
                    f"{file}: is not what its rows give; render it again:"
                    f" python -m tdq_exp table {name} --scale {scale}"
                )
    return found, runs
