"""Draw all tables, figures and claims of a scale again, from committed rows and numbers.

python -m tdq_exp render --scale small      -> results/tables, results/figures: the same bytes

No network, no tracker. One process for all three, so that each configuration is composed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import claims, cli, figure, table


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

    where = ["--scale", options.scale, "--out", str(options.out)]
    for command, what in ((table, ["all"]), (figure, ["all"]), (claims, [])):
        code = command.main([*what, *where])
        if code:
            return code
    return 0
