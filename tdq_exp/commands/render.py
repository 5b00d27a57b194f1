"""Draw all tables, figures and claims of a scale again, from committed rows and numbers.

python -m tdq_exp render --scale small      -> results/tables, results/figures: the same bytes

No network, no tracker. One process for all three, so that each configuration is composed once. What
is refused keeps the files that it had, and is named at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import claims, cli, figure, table
from tdq_exp.runtime.refusals import Refusals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 for a user's mistake or rows that do not compare.
    """
    parser = cli.parser(__doc__, "python -m tdq_exp render")
    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of results (default: results)"
    )
    options = parser.parse_args(arguments)

    return cli.exit_code(render, options.scale, options.out)


def render(scale: str, out: Path) -> int:
    """Draw everything that can be drawn, then name what was refused.

    Returns:
        The exit code: 2 if anything was refused.

    Raises:
        ValueError: for a scale or a folder that does not exist, before anything is drawn.
    """
    refusals = Refusals()
    where = ["--scale", scale, "--out", str(out)]

    table.make_all(table.parse([table.ALL, *where]), refusals)
    figure.make(figure.parse([figure.ALL, *where]), refusals)
    with refusals.of("claims"):
        claims.show(scale, out.expanduser())

    refusals.show()
    return cli.MISTAKE if refusals.lines else 0
