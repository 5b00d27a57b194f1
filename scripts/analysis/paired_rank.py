"""Say how well the paired distance ranks runs -> results/analysis/paired_rank.json and .md.

    python scripts/analysis/paired_rank.py [--out results]

Every row that states its paired distance to the float model is a point; see
`tdq_exp.report.paired_rank`. It reads committed rows alone and takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tdq_exp.report import page_rows, pages, paired_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results")
    options = parser.parse_args()

    rows = list(page_rows.read_rows(options.out))
    groups = paired_rank.groups_of(rows)
    measured = {
        group.name: {
            "rows": len(group.points),
            "by_relative_l2": group.by_l2,
            "interval": group.interval,
            "by_psnr": group.by_psnr,  # each point is in its row, and on the page
        }
        for group in groups
    }
    stem = options.out / "analysis" / "paired_rank"
    lines = paired_rank.markdown(groups, paired_rank.left_out(rows))
    pages.report(stem, {"groups": measured}, pages.about(), lines)


if __name__ == "__main__":
    main()
