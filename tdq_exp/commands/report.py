"""Write everything that was measured as one page, which opens from disk without a network.

examples:
  python -m tdq_exp report                    results/report.html, of all scales that have rows
  python -m tdq_exp report --scale digits     of one scale
The same rows and figures give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.report import page
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.refusals import Refusals

SCALES = ("small", "digits", "paper")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp report")
    parser.add_argument(
        "--scale",
        action="append",
        choices=SCALES,
        help="paper, small or digits, once or several times (default: all that have rows)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of runs, tables and figures (default: results)",
    )
    return cli.exit_code(write, parser.parse_args(arguments))


def write(options: argparse.Namespace) -> int:
    """Write the page, then name what it could not show.

    Returns:
        The exit code: 2 if there is something that it could not show.

    Raises:
        ValueError: if there is nothing to show, or no such folder.
    """
    out = options.out.expanduser()
    cli.require_results(out, is_read=True)
    path = out / "report.html"

    refusals = Refusals()
    text = page.html(out, options.scale or SCALES, refusals)
    files.write_text(path, text)
    console.print(f"report    {path} ({len(text.encode()) / 1e6:.2f} MB)")

    refusals.show()
    return cli.MISTAKE if refusals.lines else 0
