"""Print how well the paired distance ranks runs -> results/analysis/paired_distance.json and .md.

    python scripts/analysis/paired_distance.py [--out results]

Every row that states its paired distance to the float model is a point; Spearman's rank correlation
with the Frechet distance is taken within each model and set of features. Where it is near 1, users
can sweep on the paired distance, which takes seconds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdq_exp.experiment.row import read_rows
from tdq_exp.report import pages
from tdq_exp.report.render import markdown_lines

FEW = 3  # fewer rows have no rank correlation worth a number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results")
    options = parser.parse_args()

    groups = points(options.out)
    measured = {
        name: {"runs": group, "correlation": correlation(group)} for name, group in groups.items()
    }
    stem = options.out / "analysis" / "paired_distance"
    pages.report(stem, {"groups": measured}, pages.about(), page(measured))


def points(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return `model, features` -> the rows that state their paired distance, best first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted((out / "runs").glob("*/seed*/*/metrics.json")):
        for row in read_rows(file):
            if "paired" not in row:
                continue
            name = f"{row['config']['model']['label']}, {row['features']['name']} features"
            groups[name].append(
                {
                    "run": f"{row['name']} seed {row['seed']} {row['sample']}",
                    "fid": row["metrics"]["fid"],
                    "relative_l2": row["paired"]["relative_l2"],
                    "psnr": row["paired"]["psnr"],
                }
            )
    return {name: sorted(group, key=distance) for name, group in sorted(groups.items())}


def distance(point: dict[str, Any]) -> float:
    """Return the Frechet distance of a point."""
    return float(point["fid"])


def correlation(group: Sequence[dict[str, Any]]) -> float | None:
    """Return Spearman's rank correlation of Frechet and paired distance; None for few rows."""
    if len(group) < FEW:
        return None
    a, b = (ranks([point[key] for point in group]) for key in ("fid", "relative_l2"))
    return float(np.corrcoef(a, b)[0, 1])


def ranks(numbers: Sequence[float]) -> np.ndarray:
    """Return the ranks of numbers; equal ones share the mean of theirs."""
    values = np.asarray(numbers, dtype=float)
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


def page(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the Markdown page."""
    lines = ["# Paired distance beside the Frechet distance", ""]
    if not measured:
        return [*lines, "No row states its paired distance yet."]

    for name, group in measured.items():
        found = group["correlation"]
        text = "too few rows" if found is None else f"rank correlation {found:.3f}"
        rows = [
            [
                point["run"],
                f"{point['fid']:.2f}",
                f"{point['relative_l2']:.4f}",
                "-" if point["psnr"] is None else f"{point['psnr']:.2f}",
            ]
            for point in group["runs"]
        ]
        lines += [f"## {name}: {text} over {len(rows)} rows", ""]
        headers = ["run", "Frechet distance", "relative L2 to float", "PSNR (dB)"]
        lines += [*markdown_lines(headers, rows), ""]
    return lines[:-1]


if __name__ == "__main__":
    main()
