"""Cells become the texts of a table: distance, second metrics, gap to float, published number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdq_exp.report.cells import Cell
from tdq_exp.report.column_notes import column_notes, time_note
from tdq_exp.report.costs import COST_HEADERS, Costs
from tdq_exp.report.manifest import Line, Manifest
from tdq_exp.report.protocol import check_protocol
from tdq_exp.report.second import SECOND, Shown, fixed
from tdq_exp.report.spread import (
    any_short,
    interval,
    is_tie,
    mean,
    metric_of,
    over_training_seeds,
    used,
    values,
)
from tdq_exp.report.text_tables import EITHER_SIDE, SHORT, STALE, TIE, TextTable


def text_table(
    manifest: Manifest,
    scale: str,
    cells: Sequence[Cell],
    overrides: Sequence[str] = (),
    costs: Costs | None = None,
) -> TextTable:
    """Return a table, filled from the rows of its cells.

    Args:
        manifest: the table.
        scale: for the title.
        cells: of every line and column, with their rows.
        overrides: what the cells were asked for with, for the footer.
        costs: what each run costs, for a table that shows it.

    Raises:
        ValueError: if the rows of a column are of more than one protocol.
    """
    names = manifest.at(scale)
    columns = [FilledColumn(manifest, name, cells, len(names) > 1, costs) for name in names]
    headers = [("method", ""), ("bits W/A", ""), *(h for column in columns for h in column.headers)]

    # The float model and real images come first, then a group of lines for each pair of widths.
    groups = [[_line_texts(manifest.float_model, columns), *_real_texts(columns)]]
    for line in manifest.lines:
        if len(groups) == 1 or groups[-1][0][1] != line.bits:
            groups.append([])
        groups[-1].append(_line_texts(line, columns))

    title = f"{manifest.title}, scale {scale}"
    return TextTable(title, headers, groups, _notes(manifest, columns, overrides))


def over_bits(
    manifest: Manifest, cells: Sequence[Cell]
) -> tuple[dict[str, dict[int, float]], float | None]:
    """Return the distances of a column's lines over the bits of activations, for a picture.

    Stale and short rows are left out: a picture has no marks.

    Returns:
        Method -> bits -> distance, at one width of the weights; and the float model's distance.
    """

    def mean_of(line: Line) -> float | None:
        current = [c for c in cells if c.line == line and not c.changes and not c.short]
        distances = values(current, "fid")
        return mean(distances) if distances else None

    methods: dict[str, dict[int, float]] = {}
    for line in manifest.lines:
        weight, act = (int(bits) for bits in line.bits.split("/"))
        distance = mean_of(line)
        if weight == manifest.plot_weight_bits and distance is not None:
            methods.setdefault(line.label, {})[act] = distance

    return methods, mean_of(manifest.float_model)


def distance_name(cells: Sequence[Cell]) -> str:
    """Return `FID`, or the distance with the name of its features."""
    name = _features(cells)
    return "FID" if name.startswith("inception") else f"Frechet distance ({name} features)"


def model_label(cells: Sequence[Cell]) -> str:
    """Return what runs of a column's model are called by."""
    return str(cells[0].config["model"]["label"])


def _features(cells: Sequence[Cell]) -> str:
    recorded = (str(cell.row["features"]["name"]) for cell in cells if cell.row)
    return next(recorded, str(cells[0].config["eval"]["label"]))


class FilledColumn:
    """A column with its cells: what it says in each line.

    Args:
        manifest: the table.
        name: of the column.
        cells: of the whole table.
        several: whether the table has other columns, so that this one's headers name the model.
        costs: what each run costs, if the table shows it.

    Raises:
        ValueError: if its rows are of more than one protocol.
    """

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        cells: Sequence[Cell],
        several: bool,
        costs: Costs | None = None,
    ) -> None:
        self.name, self.costs = name, costs
        self.cells = [cell for cell in cells if cell.column == name]
        check_protocol(self.cells)

        self.prefix = f"{model_label(self.cells)}: " if several else ""
        self.reference = self.of(manifest.float_model)
        self.lines = manifest.lines
        self.over_seeds = over_training_seeds(self.of(line) for line in self.lines)
        self.publishes = any(name in line.fid for line in manifest.lines)
        self.second = [shown for shown in SECOND if self._has(shown)]
        self.headers = self._headers(manifest.columns[name].published)

    def _headers(self, published: str) -> list[tuple[str, str]]:
        """Return (name, detail) of each header; only Inception's distance is called FID."""
        features = _features(self.cells)
        inception = features.startswith("inception")
        detail = "" if inception else f"{features} features"

        headers = [(self.prefix + ("FID" if inception else "Frechet distance"), detail)]
        for shown in self.second:
            headers.append(
                (self.prefix + (shown.inception_name if inception else shown.name), detail)
            )
        headers.append((f"{self.prefix}gap to float", ""))
        if self.costs is not None:
            return [*headers, *((self.prefix + header, unit) for header, unit in COST_HEADERS)]
        return [*headers, ("published", published)] if self.publishes else headers

    def _has(self, shown: Shown) -> bool:
        """Return whether a metric is asked for, or stated by some row."""
        asked = {f"{name}_mean" for name in self.cells[0].config["eval"]["metrics"]}
        stated = any(metric_of(cell, key) is not None for cell in self.cells for key in shown.keys)
        return stated or bool(asked & set(shown.keys))

    def of(self, line: Line) -> list[Cell]:
        """Return the cells of a line."""
        return [cell for cell in self.cells if cell.line == line]

    def seeds(self, line: Line) -> str:
        """Return what a line's label says of its seeds; empty if there is one."""
        cells, filled = self.of(line), used(self.of(line))
        if len(cells) == 1 or not filled:
            return ""

        kind = "sampling" if len(line.sampler_seeds) > 1 else "training"
        text = f"{len(filled)} {kind} seed" + ("" if len(filled) == 1 else "s")
        return text + (f" out of {len(cells)}" if len(filled) < len(cells) else "")

    def numbers(self, line: Line) -> list[str]:
        """Return distance, second metrics, gap and published number of a line."""
        cells = self.of(line)
        distance = _distance_text(cells) + (TIE if self.ties_with_the_best(line) else "")
        second = [self._second_text(cells, shown) for shown in self.second]

        first = [distance, *second, self._gap(cells)]
        if self.costs is not None:
            return [*first, *self.costs.texts(cells[0].run)]

        if not self.publishes:
            return first

        published = line.fid.get(self.name)
        return [*first, "-" if published is None else f"{published:.2f}"]

    def ties_with_the_best(self, line: Line) -> bool:
        """Return whether a line is not the best of its bit widths, but ties with it (see `spread`).

        Lines with short rows are left out of the comparison.
        """
        rivals = [
            other
            for other in self.lines
            if other.bits == line.bits and not any_short(self.of(other))
        ]
        ranked = sorted(
            (mean(distances), number)
            for number, other in enumerate(rivals)
            if (distances := values(self.of(other), "fid"))
        )
        if line not in rivals or not ranked:
            return False

        best = rivals[ranked[0][1]]
        pair = self.of(line), self.of(best)
        return best != line and is_tie(*pair, self.reference, self.over_seeds) is True

    def _second_text(self, cells: Sequence[Cell], shown: Shown) -> str:
        """Return the means of a second metric; `-` where rows lack it."""
        if not used(cells):
            return "missing"

        found = [values(cells, key) for key in shown.keys]
        if not any(found):
            return "-"
        if len(found) == 1:
            return _metric_text(cells, shown.keys[0], shown.digits)
        return shown.text([mean(numbers) if numbers else None for numbers in found]) + marks(cells)

    def _gap(self, cells: Sequence[Cell]) -> str:
        """Return the distance beyond the float model's mean; `-` for it and for short rows."""
        ours, theirs = values(cells, "fid"), values(self.reference, "fid")
        short = any_short(cells) or any_short(self.reference)

        if cells == self.reference or not ours or not theirs or short:
            return "-"
        return fixed(mean(ours) - mean(theirs), 2, "+")

    def real(self, kind: str) -> dict[str, Any] | None:
        """Return the metrics of real images of a kind, from the float model's row."""
        return next((cell.row.get(kind) for cell in used(self.reference) if cell.row), None)

    def real_numbers(self, kind: str) -> list[str]:
        """Return the same as `numbers`, of real images."""
        metrics = self.real(kind)
        if metrics is None:
            absent = "missing" if kind == "held_out" else "-"
            return [absent, *(absent for _ in self.second), *self._no_numbers()]

        distance = "-" if metrics.get("fid") is None else f"{metrics['fid']:.2f}"
        texts = []
        for shown in self.second:
            numbers = [metrics.get(key) for key in shown.keys]
            texts.append("-" if numbers == [None] * len(numbers) else shown.text(numbers))
        return [distance, *texts, *self._no_numbers()]

    def _no_numbers(self) -> list[str]:
        """Return the texts of real images where models have a gap, and a cost or publication."""
        after = int(self.publishes) if self.costs is None else len(COST_HEADERS)
        return ["-"] * (1 + after)


def _distance_text(cells: Sequence[Cell]) -> str:
    """Return the distance of a line with its spread over seeds, or, of one row, its interval."""
    half_width = interval(cells)
    if half_width is None:
        return _metric_text(cells, "fid")
    return f"{fixed(values(cells, 'fid')[0], 2)} {EITHER_SIDE} {fixed(half_width, 2)}{marks(cells)}"


def _metric_text(cells: Sequence[Cell], metric: str, digits: int = 2) -> str:
    """Return the mean of a metric, its spread over seeds and its marks."""
    numbers = values(cells, metric)
    if not numbers:
        return "-" if used(cells) else "missing"

    ends = (fixed(end(numbers), digits) for end in (min, max))
    spread = f" ({'..'.join(ends)})" if len(numbers) > 1 else ""
    return f"{fixed(mean(numbers), digits)}{spread}{marks(cells)}"


def marks(cells: Sequence[Cell]) -> str:
    """Return the marks of stale and of short rows."""
    stale = STALE if any(cell.changes for cell in used(cells)) else ""
    short = SHORT if any(cell.short for cell in used(cells)) else ""
    return stale + short


def _line_texts(line: Line, columns: Sequence[FilledColumn]) -> list[str]:
    seeds = dict.fromkeys(text for column in columns if (text := column.seeds(line)))
    label = line.label + (f", mean (min..max) of {' and '.join(seeds)}" if seeds else "")
    return [label, line.bits, *(text for column in columns for text in column.numbers(line))]


def _real_texts(columns: Sequence[FilledColumn]) -> list[list[str]]:
    """Return the lines for held-out real images, measured as if they were generated.

    They show what a perfect model would reach; reconstructed by the autoencoder, what a perfect
    latent model would reach.
    """
    lines = []
    for kind, label in (
        ("held_out", "real images, held out"),
        ("reconstructed", "the same, reconstructed"),
    ):
        counts = sorted({real["images"] for column in columns if (real := column.real(kind))})
        if not counts and kind != "held_out":
            continue

        images = f" ({' or '.join(map(str, counts))} images)" if counts else ""
        numbers = [text for column in columns for text in column.real_numbers(kind)]
        lines.append([label + images, "-", *numbers])

    return lines


def _notes(
    manifest: Manifest, columns: Sequence[FilledColumn], overrides: Sequence[str]
) -> list[str]:
    """Return the footer: the protocol of each column, and the state of the cells."""
    notes = [manifest.caption] if manifest.caption else []
    notes += [note for column in columns for note in column_notes(column.cells, column.prefix)]

    # How complete and how current the table is.
    cells = [cell for column in columns for cell in column.cells]
    filled = [cell for cell in cells if cell.row]
    stale, short = sum(bool(c.changes) for c in filled), sum(c.short for c in filled)
    notes.append(
        f"Of {len(cells)} cells {len(cells) - len(filled)} missing;"
        f" {stale} stale ({STALE}: made with another configuration than the experiment's);"
        f" {short} short ({SHORT}: fewer images than the experiment asks for, no gap)."
    )

    if older := sum(_lacks_what_rows_have(cell) for cell in filled):
        notes.append(
            f"Rows measured without half-sampling, or without precision and recall: {older}."
        )

    if filled:
        notes.append("Gaps are to the float model's mean in our own column.")
        notes.append(time_note(filled))
    if any(interval(column.of(line)) for column in columns for line in manifest.lines):
        notes.append(
            f"{EITHER_SIDE}: two standard deviations of the distance over halves of the images"
            " (half-sampling), of one row; training with another seed is not in it."
        )
    if any(column.ties_with_the_best(line) for column in columns for line in manifest.lines):
        notes.append(
            f"{TIE}: a tie with the best of its bit widths; the difference is no larger than the"
            " spread over seeds (max - min, of either line or of the float model's sampling) or"
            f" four deviations of half-sampling.{_of_single_seeds(columns)}"
        )
    notes += [columns[0].costs.note] if columns[0].costs else []
    if overrides:
        notes.append(f"Asked for with {' '.join(overrides)}.")

    # Where published numbers are from.
    sources = sorted(
        {line.source for line in (manifest.float_model, *manifest.lines) if line.source}
    )
    if sources:
        notes.append(f"Published: {'; '.join(sources)}.")
    return notes


def _of_single_seeds(columns: Sequence[FilledColumn]) -> str:
    """Return what ties assume of lines with one training seed."""
    known = [
        f"{column.prefix}{100 * column.over_seeds:.1f} %" for column in columns if column.over_seeds
    ]
    if not known:
        return " No line here has several training seeds, so what these change is not counted."
    return (
        " A line with one training seed is taken to vary by as much of its mean as the column's"
        f" widest line with several: {', '.join(known)}."
    )


def _lacks_what_rows_have(cell: Cell) -> bool:
    """Return whether a row is older than the numbers that measuring adds to every row today."""
    row = cell.row or {}
    return not row.get("half_sampling") or not row.get("precision_recall")
