"""How well the paired distance to the float model ranks runs: Spearman's rank correlation.

A row states its Frechet distance, and the distance of a few of its images to those that the float
model draws from the same noise. Where both rank runs alike, users can sweep on the second, which
takes seconds. Rows are compared within one model, one set of features, one number of sampling
steps, and whatever else a column of a table has in common (`protocol`), the number of images
among it:

    rho = corr(rank(Frechet distance), rank(relative L2))        or rank(-PSNR)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdq_exp.report.protocol import PROTOCOL, select
from tdq_exp.report.text_tables import markdown_lines

FEWEST = 5  # rows that a rank correlation is stated of
DRAWS = 1000  # of the bootstrap
FEWEST_DRAWN = 10  # rows below which a bootstrap draws the same few again and again
OPEN = "can't tell"

Key = tuple[str, str, int]
Protocol = tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A row with both distances.

    Args:
        run: name of the run, its training seed if it is not the first, its sampled set.
        method: `lsq_tdq`, for a chart.
        distance: Frechet distance.
        relative_l2: of the pixels to the float model's.
        psnr: in dB; None for equal images.
    """

    run: str
    method: str
    distance: float
    relative_l2: float
    psnr: float | None


@dataclass(frozen=True)
class Group:
    """The rows of one model, set of features, number of sampling steps and protocol, best first.

    Args:
        model: label of it.
        features: name of them.
        steps: of the sampler.
        points: the rows.
        protocol: what tells it from other groups of the same three, in words; empty if it is alone.
    """

    model: str
    features: str
    steps: int
    points: Sequence[Point]
    protocol: str = ""

    @property
    def name(self) -> str:
        """What the group is about, in words."""
        name = f"{self.model}, {self.features} features, {self.steps} steps"
        return f"{name}, {self.protocol}" if self.protocol else name

    @property
    def by_l2(self) -> float | None:
        """Spearman's rho of Frechet distance and relative L2; None if it can't be told."""
        return rank_correlation(self._distances, self._l2)

    @property
    def by_psnr(self) -> float | None:
        """Spearman's rho of Frechet distance and -PSNR; None if it can't be told."""
        return rank_correlation(self._distances, [-p for p in self._psnr])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where rho of relative L2 lies in 95 % of bootstrap draws; None if it can't be told."""
        return bootstrap(self._distances, self._l2)

    @property
    def _distances(self) -> list[float]:
        return [point.distance for point in self.points]

    @property
    def _l2(self) -> list[float]:
        return [point.relative_l2 for point in self.points]

    @property
    def _psnr(self) -> list[float]:
        return [float("inf") if p.psnr is None else p.psnr for p in self.points]


def groups_of(rows: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Return the groups of all rows that state both distances, by model, features and steps.

    Rows that must not stand in one column of a table are of two groups.
    """
    found: dict[Key, dict[Protocol, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("paired") is None or row["metrics"].get("fid") is None:
            continue
        config = row["config"]
        key = (config["model"]["label"], row["features"]["name"], config["sampler"]["steps"])
        protocol = tuple(str(select(row, path)) for path in PROTOCOL)
        found[key][protocol].append(_point(row))

    return [
        Group(*key, sorted(points, key=_distance), _in_words(protocol, list(protocols)))
        for key, protocols in sorted(found.items())
        for protocol, points in sorted(protocols.items())
    ]


def left_out(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return how many rows of quantized networks state no paired distance: they are older."""
    return sum(row.get("paired") is None for row in rows if row["config"]["method"]["quantized"])


def _point(row: Mapping[str, Any]) -> Point:
    config, paired = row["config"], row["paired"]
    labels = (config["method"]["label"], config["tdq"]["label"])
    seed = f" seed {row['seed']}" if row["seed"] else ""
    return Point(
        run=f"{row['name']}{seed} {row['sample']}",
        method="_".join(label for label in labels if label),
        distance=row["metrics"]["fid"],
        relative_l2=paired["relative_l2"],
        psnr=paired["psnr"],
    )


def _in_words(protocol: Protocol, every: Sequence[Protocol]) -> str:
    """Return the values in which a protocol differs from any other one."""
    return ", ".join(
        f"{path.removeprefix('config.')} {protocol[number]}"
        for number, path in enumerate(PROTOCOL)
        if len({other[number] for other in every}) > 1
    )


def _distance(point: Point) -> float:
    return point.distance


# --- Statistics


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rho; None for few pairs, or where one side has a single value."""
    if len(a) < FEWEST or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Return the 2.5 and 97.5 % quantiles of rho over pairs that are drawn with replacement.

    None for few pairs.
    """
    if len(a) < FEWEST_DRAWN or rank_correlation(a, b) is None:
        return None

    generator = np.random.default_rng(0)
    x, y = np.asarray(a), np.asarray(b)
    drawn = []
    for _ in range(DRAWS):
        chosen = generator.integers(0, len(x), len(x))
        rho = rank_correlation(x[chosen].tolist(), y[chosen].tolist())
        drawn += [] if rho is None else [rho]

    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def ranks(numbers: Sequence[float]) -> NDArray[np.float64]:
    """Return the ranks of numbers; equal ones share the mean of theirs."""
    values = np.asarray(numbers, dtype=float)
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return np.asarray(below + (equal - 1) / 2, dtype=float)


# --- As text


HEADERS = (
    "model, features, sampling steps",
    "rows",
    "rank correlation, relative L2",
    "95 % of bootstrap draws",
    "rank correlation, -PSNR",
)


def summary(groups: Sequence[Group]) -> list[list[str]]:
    """Return a line of texts for each group, in the order of `HEADERS`."""
    return [
        [
            group.name,
            str(len(group.points)),
            _text(group.by_l2),
            "-"
            if group.interval is None
            else f"{group.interval[0]:.2f} to {group.interval[1]:.2f}",
            _text(group.by_psnr),
        ]
        for group in groups
    ]


def markdown(groups: Sequence[Group], others: int = 0) -> list[str]:
    """Return the lines of a page: the correlations, then every row.

    Args:
        groups: of rows.
        others: see `left_out`.
    """
    lines = ["# Paired distance beside the Frechet distance", ""]
    if not groups:
        return [*lines, "No row states its paired distance yet."]

    lines += [
        "Spearman's rank correlation of the Frechet distance with the distance of the same run's"
        " first images to those of the float model from the same noise. 1: both rank the runs"
        f" alike. Below {FEWEST} rows it can't be told.",
        "",
        *markdown_lines(HEADERS, summary(groups)),
    ]
    if others:
        lines += ["", f"Rows without a paired distance, not among these: {others}."]
    for group in groups:
        rows = [
            [p.run, f"{p.distance:.2f}", f"{p.relative_l2:.4f}", _text(p.psnr, none="equal")]
            for p in group.points
        ]
        headers = ["run", "Frechet distance", "relative L2 to float", "PSNR (dB)"]
        lines += ["", f"## {group.name}", "", *markdown_lines(headers, rows)]
    return lines


def _text(number: float | None, none: str = OPEN) -> str:
    return none if number is None else f"{number:.2f}"
