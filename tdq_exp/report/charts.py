"""Charts of tables: distance over bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from tdq_exp.runtime.figures import save_figure


@dataclass(frozen=True)
class Panel:
    """What `distance_over_bits` draws of one model.

    Args:
        title: above it.
        label: of the distance, with its features.
        methods: name -> bits -> distance.
        floor: the float model's distance, if known: a dashed line.
    """

    title: str
    label: str
    methods: Mapping[str, Mapping[int, float]]
    floor: float | None


class _PlainNumbers(LogFormatter):
    """`200` and `0.5` on a logarithmic axis, where matplotlib would label at all."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def distance_over_bits(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw distance over the activations' bits: a panel for each model, a line for each method.

    Args:
        panels: side by side.
        path: PNG to write; an SVG goes beside it.
        title: above them all.
    """
    figure = Figure(figsize=(5.5 * len(panels) + 0.5, 4), dpi=150)

    # Panels of one measure have one scale, so that heights compare.
    same = len({panel.label for panel in panels}) == 1
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=same))

    # A method looks the same in every panel.
    names = list(dict.fromkeys(name for panel in panels for name in panel.methods))
    styles = {name: {"color": f"C{i}", "marker": "osD^v<>"[i % 7]} for i, name in enumerate(names)}

    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, styles)

    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".svg"))


def _draw_panel(axis: Any, panel: Panel, styles: Mapping[str, Mapping[str, str]]) -> None:
    for name, values in panel.methods.items():
        bits = sorted(values, reverse=True)
        axis.plot(bits, [values[b] for b in bits], ms=4, lw=1.3, label=name, **styles[name])
    if panel.floor is not None:
        axis.axhline(panel.floor, color="0.4", ls="--", lw=1, label="float")

    # Bits fall to the right: the further right, the harder.
    axis.set_xticks(sorted({b for values in panel.methods.values() for b in values}, reverse=True))
    axis.invert_xaxis()

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_PlainNumbers())
    axis.yaxis.set_minor_formatter(_PlainNumbers(labelOnlyBase=False, minor_thresholds=(2, 0.5)))

    axis.set(xlabel="bits of activations", ylabel=panel.label.replace(" (", "\n("))
    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(axis="y", which="both", labelleft=True)  # on every panel, shared or not
    axis.grid(axis="y", which="both", color="0.92")
    axis.legend(fontsize=8, frameon=False)
