"""What all drawn figures share: colours, panels, names of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

Numbers = Mapping[str, Any]

# Colours that differ for everybody, on white and on black (Okabe and Ito, the pink darker).
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#b8578f", "#808080"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#b08a00", "#5b8db8")
MARKERS = "osD^v<>"
LINES = ("-", "--", ":")
SMALL, TINY = 8, 7  # points


def style(number: int) -> dict[str, str]:
    """Return colour, marker and line of a curve, by its number: none alike for the first 18."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "ls": LINES[number // len(COLOURS) % len(LINES)]}


def side_by_side(record: Numbers, height: float) -> tuple[Figure, list[Any]]:
    """Return a figure with a panel for each column, side by side."""
    count = len(record["columns"])
    figure = Figure(figsize=(5.2 * count + 0.4, height), dpi=130, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def stacked(figure: Figure, count: int, heights: Sequence[float] | None = None) -> list[Any]:
    """Return parts of a figure below each other."""
    if not count:
        return []
    return list(figure.subfigures(count, 1, squeeze=False, height_ratios=heights)[:, 0])


def finish(axis: Any, column: Numbers) -> None:
    """Give a panel its title and its legend; one without any curve says what is missing."""
    if not axis.has_data():
        axis.clear()
        axis.set_axis_off()
        missing = "missing:\n" + "\n".join(column["missing"])
        axis.text(0.5, 0.5, missing, ha="center", va="center", fontsize=SMALL, color=GREY)
    else:
        axis.tick_params(labelsize=TINY, which="both")
        axis.legend(fontsize=TINY, frameon=False)
    axis.set_title(with_missing(column), fontsize=9)


def with_missing(column: Numbers) -> str:
    """Return the model's name, and how many of its cells are missing."""
    count = len(column["missing"])
    return column["model"] + (f" ({count} missing)" if count else "")


def short_name(name: str) -> str:
    """Return a layer's name with the words of diffusers shortened."""
    for long, short in SHORTER.items():
        name = name.replace(long, short)
    return re.sub(r"\.proc\w*", "", name)


SHORTER = {
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "resnets": "res",
    "attentions": "attn",
    "downsamplers": "downsample",
    "upsamplers": "upsample",
    ".input": "",
    "time_embedding": "time",
    "time_emb_proj": "time",
}
