"""The protocol of a column: rows that were measured in two ways must not stand in one.

A reader compares whatever stands in one column, so rows that differ in a field of `PROTOCOL` are
refused and no table is written. There are two exceptions:

- a short row may differ in its number of images, which is said beside it; the distance grows as the
  images get fewer, so it takes no part in any gap;
- the float model has no checkpoints to choose from, so `report` is compared between the quantized
  rows alone.

A stale row is no exception: that it is old is said beside it, but it must have been measured in the
same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdq_exp.report.cells import Cell

SAMPLER = ("steps", "spacing", "eta", "clip", "offset", "final_alpha_one", "truncate")
PROTOCOL = (
    "features.name",
    "features.weights",
    "images",
    "config.sampler.method._target_",
    *(f"config.sampler.{key}" for key in SAMPLER),
    "report",
    "reference.content",
    "reference.images",
    "reference.protocol",
    "weights",
    "autoencoder",
)


def check_protocol(cells: Sequence[Cell]) -> None:
    """Refuse rows that must not stand in one column.

    Raises:
        ValueError: naming the field and both values.
    """
    for key in PROTOCOL:
        first: tuple[str, Any] | None = None

        for cell in cells:
            if cell.row is None or _is_exempt(key, cell):
                continue

            value = select(cell.row, key)
            first = first or (cell.name, value)
            if value != first[1]:
                raise ValueError(
                    f"rows of two protocols in one column: {key} is {first[1]} in {first[0]} and"
                    f" {value} in {cell.name}; run one of them as the other, or move its row away"
                )


def select(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of a row; None if there is none."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_exempt(key: str, cell: Cell) -> bool:
    if key == "images":
        return cell.short
    if key == "report":
        return not cell.config["method"]["quantized"]
    return False
