"""Which differences between two lines of a table count.

A line's *spread* is the range of its distances over seeds, or the interval of half-sampling (twice
the deviation to either side), whichever is wider. The rule is one for all tables and claims:

    two lines differ   <=>   |mean_a - mean_b| > max(spread_a, spread_b, spread of the column)

The spread of the column is that of the float model's sampling seeds. Sampling is not all that
varies: a fit with another seed gives another network. A line of a single training seed is therefore
taken to vary as the column's other lines do, by the widest (max - min) / mean that is known of a
line with several training seeds. Lines that do not differ are ties. Where no spread is known at
all, nothing can be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tdq_exp.report.cells import Cell

DEVIATIONS = 4.0  # width of the half-sampling interval, in standard deviations


def used(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that a line's numbers come from: short ones only if there are no others."""
    filled = [cell for cell in cells if cell.row]
    return [cell for cell in filled if not cell.short] or filled


def values(cells: Sequence[Cell], metric: str) -> list[float]:
    """Return a metric of a line's cells; nothing if one of them lacks it."""
    found = [metric_of(cell, metric) for cell in used(cells)]
    return [value for value in found if value is not None] if None not in found else []


def metric_of(cell: Cell, metric: str) -> float | None:
    """Return a metric of a cell's row: one that was asked for, or one that is stated beside."""
    if cell.row is None:
        return None
    beside = cell.row.get("precision_recall") or {}
    return cell.row["metrics"].get(metric, beside.get(metric))


def mean(numbers: Sequence[float]) -> float:
    """Return the mean of at least one number."""
    return sum(numbers) / len(numbers)


def spread(cells: Sequence[Cell]) -> float | None:
    """Return the spread of a line's distances; None if there is one seed and no half-sampling."""
    distances = values(cells, "fid")
    widths = [max(distances) - min(distances)] if len(distances) > 1 else []

    for cell in used(cells):
        halves = (cell.row or {}).get("half_sampling")
        if halves:
            widths.append(DEVIATIONS * halves["fid"])

    return max(widths, default=None)


def over_training_seeds(lines: Iterable[Sequence[Cell]]) -> float:
    """Return the widest (max - min) / mean of lines with several training seeds.

    It is 0 if there are none. Short rows tell nothing: fewer images vary more.

    Args:
        lines: of a column, each with its cells; those of float models don't count.
    """
    widest = 0.0
    for cells in lines:
        counts = is_trained(cells) and not any_short(cells)
        distances = values(cells, "fid") if counts else []
        if len(distances) > 1:
            widest = max(widest, (max(distances) - min(distances)) / mean(distances))
    return widest


def any_short(cells: Sequence[Cell]) -> bool:
    """Return whether a line's numbers come from short rows."""
    return any(cell.short for cell in used(cells))


def is_trained(cells: Sequence[Cell]) -> bool:
    """Return whether a line's networks are fitted here, so that they depend on a training seed."""
    return bool(cells) and bool(cells[0].config.get("method", {}).get("quantized"))


def difference(
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    float_model: Sequence[Cell],
    over_seeds: float = 0.0,
) -> tuple[float, float] | None:
    """Return how much larger one line's distance is than another's, and what it must exceed.

    Args:
        ours, theirs: cells of both lines.
        float_model: cells of the column's float model; short ones tell no spread.
        over_seeds: see `over_training_seeds`; of the column.

    Returns:
        (mean_a - mean_b, largest of the spreads); None if a line has no distance, a short row, or
        no spread is known.
    """
    a, b = values(ours, "fid"), values(theirs, "fid")
    lines = [ours, theirs] if any_short(float_model) else [ours, theirs, float_model]
    widths = [w for w in map(spread, lines) if w is not None]

    if not a or not b or any_short(ours) or any_short(theirs) or not widths:
        return None

    single = [line for line in (ours, theirs) if is_trained(line) and len(used(line)) == 1]
    widths += [over_seeds * mean(values(line, "fid")) for line in single]
    return mean(a) - mean(b), max(widths)


def is_tie(
    ours: Sequence[Cell],
    theirs: Sequence[Cell],
    float_model: Sequence[Cell],
    over_seeds: float = 0.0,
) -> bool | None:
    """Return whether two lines are a tie; None if that can't be told. See `difference`."""
    found = difference(ours, theirs, float_model, over_seeds)
    return None if found is None else abs(found[0]) <= found[1]


def interval(cells: Sequence[Cell]) -> float | None:
    """Return the half width of a single row's interval, two deviations of half-sampling.

    None for several seeds, whose range says more, and for a row that does not state it.
    """
    rows = [cell.row for cell in used(cells) if cell.row]
    halves = rows[0].get("half_sampling") if len(rows) == 1 else None
    return DEVIATIONS / 2 * float(halves["fid"]) if halves else None
