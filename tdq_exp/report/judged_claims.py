"""The paper's claims, judged from rows: holds, does not hold, can't tell.

`configs/claims.yaml` states each claim as comparisons of runs, and a rule. Two distances differ if
`spread.difference` says so; the verdict of a comparison is then

| rule      | holds if                            | does not hold if      |
|-----------|-------------------------------------|-----------------------|
| smaller   | theirs - ours > w                   | ours - theirs > w     |
| no_larger | ours - theirs <= w, w <= theirs / 4 | ours - theirs > w     |
| less_gain | g_1 - g_2 > w_1 + w_2               | g_2 - g_1 > w_1 + w_2 |

with w the spread, and the relative gain g = (theirs - ours) / theirs of a column, whose spread is
w / theirs. Anything else can't be told: `no_larger` needs a spread that is small beside what it
compares, or it would hold for any net that is measured badly enough. A net that is better beyond
the spread needs none. A claim does not hold if one of its comparisons does not, and holds if all
of them do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_exp.config import assets
from tdq_exp.report import cells as report_cells
from tdq_exp.report.cells import Cell, Place
from tdq_exp.report.manifest import line_of, read_manifest
from tdq_exp.report.protocol import check_protocol
from tdq_exp.report.second import fixed
from tdq_exp.report.spread import difference, mean, over_training_seeds, used, values
from tdq_exp.report.text_tables import markdown_lines

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "can't tell", "missing"
RULES = ("smaller", "no_larger", "less_gain")
WIDEST = 0.25  # spread over distance, up to which two distances can be called alike
SEEDS = (0, 1, 2)  # of training, or of sampling for the float model: whichever have rows

Choices = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Args:
        name: short, unique.
        text: a sentence.
        rule: one of `RULES`.
        columns: of Table 1, whose models it is about; `less_gain` takes two.
        ours: a line, as in a manifest.
        theirs: lines that it is compared with.
        at: choices of both sides, a comparison each.
        shared: choices of every line.
        scales: at which it is judged; empty for all.

    Raises:
        ValueError: for an unknown rule.
    """

    name: str
    text: str
    rule: str
    columns: Sequence[str]
    ours: Choices
    theirs: Sequence[Choices]
    at: Sequence[Choices]
    shared: Choices
    scales: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"{self.name}: rule={self.rule!r}: choose one of {', '.join(RULES)}")
        if any("overrides" in choices for choices in (self.shared, self.ours, *self.theirs)):
            raise ValueError(f"{self.name}: overrides stand in `at`, where both sides have them")


@dataclass(frozen=True)
class Comparison:
    """Two lines of a column, and the float model beside them, each with its cells."""

    column: str
    setting: str
    labels: tuple[str, str]
    ours: Sequence[Cell]
    theirs: Sequence[Cell]
    float_model: Sequence[Cell]
    fitted: tuple[str, ...] = ()  # overrides of the fit, where it is not that of the protocol
    over_seeds: float = 0.0  # see `spread.over_training_seeds`

    @property
    def is_missing(self) -> bool:
        """Whether a side has no row."""
        return not values(self.ours, "fid") or not values(self.theirs, "fid")

    @property
    def has_rows(self) -> bool:
        """Whether any side has a row."""
        return bool(values(self.ours, "fid") or values(self.theirs, "fid"))

    @property
    def is_stale(self) -> bool:
        """Whether a row of either side is of another configuration than the one asked for."""
        return any(cell.changes for side in (self.ours, self.theirs) for cell in used(side))

    @property
    def difference(self) -> tuple[float, float] | None:
        """Ours minus theirs, and the spread; None if that can't be told."""
        return difference(self.ours, self.theirs, self.float_model, self.over_seeds)

    @property
    def gain(self) -> tuple[float, float] | None:
        """The relative gain of ours, and its spread."""
        found, theirs = self.difference, values(self.theirs, "fid")
        if found is None or not theirs:
            return None
        return -found[0] / mean(theirs), found[1] / mean(theirs)


@dataclass(frozen=True)
class Judged:
    """A claim at one scale, with a verdict for each comparison and for the whole."""

    claim: Claim
    comparisons: Sequence[Comparison]
    verdicts: Sequence[str]

    @property
    def verdict(self) -> str:
        """The claim's verdict."""
        if FAILS in self.verdicts:
            return FAILS
        return HOLDS if self.verdicts and set(self.verdicts) == {HOLDS} else OPEN


def read_claims() -> list[Claim]:
    """Return the claims of `configs/claims.yaml`.

    Raises:
        ValueError: for a wrong key or rule.
    """
    path = assets.configs() / "claims.yaml"
    try:
        return [Claim(**content) for content in assets.read_yaml(path)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def judge(claims: Iterable[Claim], scale: str, out: Path) -> list[Judged]:
    """Return the claims with their verdicts.

    Args:
        claims: of the paper.
        scale: paper, small or digits; comparisons of columns that it lacks are left out.
        out: folder of results.

    Raises:
        ValueError: if the rows of a comparison are of two protocols, as in a table's column.
    """
    of_claims = [
        (
            claim,
            [
                comparison
                for column in claim.columns
                for at in claim.at
                for comparison in _comparisons(claim, scale, column, at, out)
            ],
        )
        for claim in claims
        if not claim.scales or scale in claim.scales
    ]
    _require_protocols(of_claims)

    # What other seeds change is known of few lines, and taken over for all of a column; where lines
    # are fitted in another way, it is at least what it is in the protocol's.
    everywhere = [comparison for _, comparisons in of_claims for comparison in comparisons]

    def over_seeds(of: Comparison) -> float:
        return over_training_seeds(
            side
            for one in everywhere
            if one.column == of.column and one.fitted in ((), of.fitted)
            for side in (one.ours, one.theirs)
        )

    judged = []
    for claim, comparisons in of_claims:
        known = [dataclasses.replace(one, over_seeds=over_seeds(one)) for one in comparisons]
        judged.append(Judged(claim, known, _verdicts(claim, known)))
    return judged


def _require_protocols(of_claims: Iterable[tuple[Claim, Sequence[Comparison]]]) -> None:
    """Refuse comparisons of rows that must not stand in one column.

    Raises:
        ValueError: naming every claim that has one, and the first of each.
    """
    faults: dict[str, str] = {}
    for claim, comparisons in of_claims:
        for one in comparisons:
            try:
                check_protocol([*one.ours, *one.theirs, *one.float_model])
            except ValueError as error:
                faults.setdefault(claim.name, f"claim {claim.name}: {error}")

    if faults:
        raise ValueError("; ".join(faults.values()))


def _comparisons(claim: Claim, scale: str, column: str, at: Choices, out: Path) -> list[Comparison]:
    """Return a claim's comparisons in one column at one setting."""
    models = read_manifest("table1").columns[column].scales
    if scale not in models:
        return []

    def cells(choices: Choices) -> list[Cell]:
        """Return the cells of a line that have a row."""
        is_float = choices.get("method") == "fp"
        content = {**({} if is_float else {**claim.shared, **at}), **choices}
        if is_float:  # it is sampled in the same way, and not fitted
            of_sampling = [o for o in at.get("overrides", ()) if o.startswith("sampler.")]
            content["overrides"] = of_sampling

        line = line_of({"label": "", **content})
        command = {"model": models[scale]["model"], **line.choices}
        seeds = [(0, seed) if is_float else (seed, 0) for seed in SEEDS]
        place = Place(column, line, scale)
        return [
            report_cells.find(cell)
            for cell in report_cells.cells_of_line(place, command, seeds, out)
        ]

    ours, float_model = cells(claim.ours), cells({"label": "float", "method": "fp"})
    setting = ", ".join(
        part
        for key, value in at.items()
        for part in (value if key == "overrides" else [str(value)])
    )
    return [
        Comparison(
            column=column,
            setting=setting,
            labels=(claim.ours["label"], theirs["label"]),
            ours=ours,
            theirs=float_model if theirs.get("method") == "fp" else cells(theirs),
            float_model=float_model,
            fitted=tuple(o for o in at.get("overrides", ()) if o.startswith("fit.")),
        )
        for theirs in claim.theirs
    ]


def _verdicts(claim: Claim, comparisons: Sequence[Comparison]) -> list[str]:
    """Return the verdict of each comparison; of a `less_gain`, one for each pair of columns."""
    if claim.rule != "less_gain":
        return [_verdict(claim.rule, comparison) for comparison in comparisons]

    first, second = (
        [comparison for comparison in comparisons if comparison.column == column]
        for column in claim.columns
    )
    if not first or not second:  # a scale without one of the models
        return []
    return [_less_gain(a, b) for a, b in zip(first, second, strict=True)]


def _verdict(rule: str, comparison: Comparison) -> str:
    found = comparison.difference
    if found is None:
        return MISSING if comparison.is_missing else OPEN

    larger_by, spread = found
    if larger_by > spread:
        return FAILS
    if larger_by < -spread:
        return HOLDS

    # Within the spread: alike, if it is narrow enough to tell.
    alike = spread <= WIDEST * mean(values(comparison.theirs, "fid"))
    return HOLDS if rule == "no_larger" and alike else OPEN


def _less_gain(first: Comparison, second: Comparison) -> str:
    if first.is_missing or second.is_missing:
        return MISSING

    a, b = first.gain, second.gain
    if a is None or b is None or abs(a[0] - b[0]) <= a[1] + b[1]:
        return OPEN
    return HOLDS if a[0] > b[0] else FAILS


# --- As text


def markdown(judged: Sequence[Judged], scale: str, out: Path) -> str:
    """Return the claims as a page: the verdicts, then every comparison and where its rows lie."""
    summary = [[j.claim.name, j.verdict, _count(j), j.claim.text] for j in judged]
    lines = [
        f"# The paper's claims, scale {scale}",
        "",
        *markdown_lines(["claim", "verdict", "comparisons", "what it says"], summary, left=4),
        "",
        "Two distances differ if they are further apart than the spread: the largest range over"
        " seeds of either line and of the float model's sampling, or four deviations of"
        " half-sampling; a line with one training seed is taken to vary by as much of its mean as"
        " the column's widest line with several that is trained by the protocol, or as this one is."
        " A tie can't tell which is smaller, nor, where the spread is more than a quarter of the"
        " distance, that nothing is lost. The rules are those of `configs/claims.yaml`.",
    ]

    for one in judged:
        lines += ["", f"## {one.claim.name}: {one.verdict}", "", one.claim.text, ""]
        lines += _comparison_lines(one, out)
    return "\n".join(lines) + "\n"


def _count(judged: Judged) -> str:
    counts = [f"{judged.verdicts.count(v)} {v}" for v in (HOLDS, FAILS, OPEN, MISSING)]
    stale = sum(one.is_stale for one in judged.comparisons)
    counts.append(f"{stale} of stale rows")
    return ", ".join(count for count in counts if not count.startswith("0 ")) or "none"


def _comparison_lines(judged: Judged, out: Path) -> list[str]:
    """Return the table of a claim's comparisons."""
    if not judged.comparisons:
        return ["No model of this scale is concerned."]

    is_gain = judged.claim.rule == "less_gain"
    rows = []
    for comparison, verdict in zip(judged.comparisons, _verdict_of_each(judged), strict=True):
        found = comparison.gain if is_gain else comparison.difference
        numbers = ["-", "-"] if found is None else _numbers(*found, is_gain)
        rows.append(
            [
                comparison.column,
                comparison.setting,
                _side(comparison.labels[0], comparison.ours),
                _side(comparison.labels[1], comparison.theirs),
                *numbers,
                verdict,
                _where(comparison, out),
            ]
        )

    headers = ["column", "at", "ours", "theirs"]
    headers += ["relative gain", "spread"] if is_gain else ["ours - theirs", "spread"]
    return markdown_lines([*headers, "verdict", "rows"], rows, left=8)


def _verdict_of_each(judged: Judged) -> list[str]:
    """Return a verdict for each comparison: both of a pair have that of the pair."""
    if judged.claim.rule != "less_gain":
        return list(judged.verdicts)
    if not judged.verdicts:  # a scale without one of the models
        return [judged.verdict] * len(judged.comparisons)

    # Column by column, in the same order in each.
    return [*judged.verdicts, *judged.verdicts]


def _side(label: str, cells: Sequence[Cell]) -> str:
    """Return `LSQ 12.30 (2 seeds)`, or that its rows are missing."""
    distances = values(cells, "fid")
    if not distances:
        return f"{label}: missing"

    seeds = f" ({len(distances)} seeds)" if len(distances) > 1 else ""
    short = ", short" if any(cell.short for cell in used(cells)) else ""
    stale = ", stale" if any(cell.changes for cell in used(cells)) else ""
    return f"{label} {mean(distances):.2f}{seeds}{short}{stale}"


def _where(comparison: Comparison, out: Path) -> str:
    """Return the folders of the rows of both sides."""
    folders = [
        f"`{(cell.folder / cell.sample).relative_to(out.resolve())}`"
        for side in (comparison.ours, comparison.theirs)
        for cell in used(side)
    ]
    return ", ".join(dict.fromkeys(folders)) or "-"


def _numbers(number: float, spread: float, percent: bool) -> list[str]:
    """Return a difference or a gain, and the spread that it must exceed, in the same unit."""
    if percent:
        return [f"{fixed(100 * number, 1, '+')} %", f"{100 * spread:.1f} %"]
    return [fixed(number, 2, "+"), f"{spread:.3g}"]
