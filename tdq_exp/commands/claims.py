"""Judge the paper's claims from the rows that are there.

python -m tdq_exp claims --scale small      -> results/tables/claims-small.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.report import judged_claims
from tdq_exp.report.manifest import read_manifest
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console, print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = cli.parser(__doc__, "python -m tdq_exp claims")
    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of results (default: results)"
    )
    options = parser.parse_args(arguments)
    return cli.exit_code(show, options.scale, options.out.expanduser())


def show(scale: str, out: Path) -> Path | None:
    """Write the page of the claims, print their verdicts, and return the page's path.

    Without any row there is no page.

    Raises:
        ValueError: for a scale that does not exist, or a damaged file of rows.
    """
    cli.require_results(out, is_read=True)
    scales = read_manifest("table1").scales
    if scale not in scales:
        raise ValueError(f"--scale {scale}: choose one of {', '.join(scales)}")

    judged = judged_claims.judge(judged_claims.read_claims(), scale, out)
    if not any(one.has_rows for claim in judged for one in claim.comparisons):
        console.print(f"the paper's claims: no row at scale {scale} yet")
        return None

    page = out / "tables" / f"claims-{scale}.md"
    files.write_text(page, judged_claims.markdown(judged, scale, out))

    print_table(
        f"the paper's claims, scale {scale}",
        ["claim", "verdict", "what it says"],
        [[one.claim.name, one.verdict, one.claim.text] for one in judged],
    )
    console.print(f"page     {page}")
    return page
