"""Charts of rows: distance over bits, sampling steps and updates, validation losses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

from tdq_exp.report.axes import (
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    SMALL,
    TINY,
    Numbers,
    finish,
    side_by_side,
    style,
    with_missing,
)
from tdq_exp.report.paired_rank import Group
from tdq_exp.runtime.figures import save_figure, svg_text

ACROSS = 3  # panels of training curves side by side
_WIDTHS = re.compile(r"_(w\d+a\d+)_(.+)")
_IN_TABLE_1 = re.compile(r"_w\d+a\d+_(lsq|lsq_tdq|pact|nipq)_release$")


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


def _plain_numbers(ticks: Any) -> None:
    """Label a logarithmic axis with plain numbers, between powers of ten too if it is short."""
    ticks.set_major_formatter(_PlainNumbers())
    ticks.set_minor_formatter(_PlainNumbers(labelOnlyBase=False, minor_thresholds=(2, 0.5)))


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
    styles = {name: style(number) for number, name in enumerate(names)}

    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, styles)

    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".svg"))


def _draw_panel(axis: Any, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, values in panel.methods.items():
        bits = sorted(values, reverse=True)
        axis.plot(bits, [values[b] for b in bits], ms=4, lw=1.3, label=name, **styles[name])
    if panel.floor is not None:
        axis.axhline(panel.floor, color=GREY, ls="--", lw=1, label="float")

    # Bits fall to the right: the further right, the harder.
    axis.set_xticks(sorted({b for values in panel.methods.values() for b in values}, reverse=True))
    axis.invert_xaxis()

    axis.set_yscale("log")
    _plain_numbers(axis.yaxis)

    axis.set(xlabel="bits of activations", ylabel=panel.label.replace(" (", "\n("))
    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(axis="y", which="both", labelleft=True)  # on every panel, shared or not
    axis.grid(axis="y", which="both", color=GREY, alpha=0.2)
    axis.legend(fontsize=8, frameon=False)


def distance_over_steps(record: Numbers) -> Figure:
    """Return Figure 8: the distance over the number of sampling steps, a panel for each model.

    Args:
        record: of `figure_numbers.distances`.
    """
    # A column without a curve would be a panel of loose points.
    every_column = record["columns"]
    with_curve = {
        name: column
        for name, column in every_column.items()
        if any(len(line) > 1 for line in column["lines"].values())
    } or every_column
    figure, axes = side_by_side({"columns": with_curve}, height=4.2)
    if without := [every_column[name] for name in every_column if name not in with_curve]:
        names = ", ".join(with_missing(column) for column in without)
        figure.supxlabel(f"without a curve yet: {names}", fontsize=TINY)

    for axis, column in zip(axes, with_curve.values(), strict=True):
        every: set[int] = set()
        for number, (label, line) in enumerate(column["lines"].items()):
            steps = sorted(map(int, line), reverse=True)
            every |= set(steps)
            float_line = number == 0
            points = [line[str(s)] for s in steps]
            axis.errorbar(
                steps,
                [point["distance"] for point in points],
                [point.get("half_width") or 0.0 for point in points],
                capsize=2,
                label=label if steps else f"{label}: missing",
                color=GREY if float_line else COLOURS[(number - 1) % 2],
                ls="--" if float_line else ("-" if "A4" in label and "W4" in label else ":"),
                marker=MARKERS[number],
                ms=4,
            )

        axis.set_xscale("log")
        axis.set_xlabel("sampling steps (bars: two deviations of half-sampling)", fontsize=8)
        axis.set_ylabel(column["label"], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(sorted(every), [str(s) for s in sorted(every)])
        axis.invert_xaxis()
        if axis.has_data():
            axis.set_ylim(bottom=0)
        axis.grid(color=GREY, alpha=0.2, axis="y")
        finish(axis, column)
    return figure


def distance_over_updates(record: Numbers) -> Figure:
    """Return the distance and the validation loss over the length of training, by model.

    Args:
        record: of `figure_numbers.distances`.
    """
    columns = list(record["columns"].values())
    figure = Figure(figsize=(10, 4.2 * len(columns)), dpi=130, layout="constrained")
    axes = figure.subplots(len(columns), 2, squeeze=False)

    for (left, right), column in zip(axes, columns, strict=True):
        trained = {label: line for label, line in column["lines"].items() if "0" not in line}
        for number, (label, line) in enumerate(trained.items()):
            _points_over_updates(left, label, line, number)
            _losses_over_updates(right, label, line, number)

        float_model = [line["0"]["distance"] for line in column["lines"].values() if "0" in line]
        for distance in float_model:
            left.axhline(distance, color=GREY, ls="--", lw=1, label="float")
        if left.has_data():
            left.set_ylim(bottom=0)  # after all lines: it fixes the upper end

        for axis, label in ((left, column["label"]), (right, "validation loss")):
            axis.set_xlabel("updates", fontsize=SMALL)
            axis.set_ylabel(label, fontsize=SMALL)
            axis.grid(color=GREY, alpha=0.2)
            finish(axis, column)
    return figure


def _points_over_updates(axis: Any, label: str, line: Mapping[str, Any], number: int) -> None:
    """Draw a line's distances, each with two deviations of half-sampling to either side."""
    updates = sorted(map(int, line))
    if updates:
        points = [line[str(u)] for u in updates]
        widths = [point.get("half_width") or 0.0 for point in points]
        distances = [point["distance"] for point in points]
        axis.errorbar(
            updates, distances, widths, ms=4, lw=1.3, capsize=3, label=label, **style(number)
        )
        axis.set_xticks(updates)


def _losses_over_updates(axis: Any, label: str, line: Mapping[str, Any], number: int) -> None:
    """Draw the validation losses of a line's fits, the longest with the strongest stroke."""
    for place, updates in enumerate(sorted(map(int, line), reverse=True)):
        curve = line[str(updates)]["validation"]
        if curve:
            x, y = zip(*curve, strict=True)
            look = {**style(number), "marker": "", "ls": LINES[place % len(LINES)]}
            axis.plot(x, y, lw=1.3, label=f"{label}, {updates} updates", **look)


def training_svg(curves: Mapping[str, Sequence[Sequence[float]]], name: str) -> str:
    """Return validation losses as an SVG element: a panel for each pair of widths.

    Args:
        curves: run -> [update, loss] of each validation; of many runs `headline` keeps a few.
        name: unique on the page.
    """
    panels: dict[str, dict[str, Sequence[Sequence[float]]]] = {}
    for run, curve in curves.items():
        widths = _WIDTHS.search(run)
        bits, label = (widths[1], widths[2]) if widths else ("float", run)
        panels.setdefault(bits, {})[label] = curve

    # A few panels a line, so that a phone shows one of them in letters that can be read. A run
    # looks the same in every panel, and the legend is below them all.
    labels = list(dict.fromkeys(label for runs in panels.values() for label in runs))
    styles = {label: style(number) for number, label in enumerate(labels)}
    across, down = min(len(panels), ACROSS), -(-len(panels) // ACROSS)
    legend = 0.25 * -(-len(labels) // across)
    size = (3.6 * across + 0.4, 3.2 * down + legend)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()

    handles = {}
    for axis, (bits, runs) in zip(axes[: len(panels)], panels.items(), strict=True):
        for label, curve in runs.items():
            updates, losses = zip(*curve, strict=True)
            (handles[label],) = axis.plot(updates, losses, ms=3, lw=1, **styles[label])

        axis.set_title(bits.upper(), fontsize=9)
        axis.set_xlabel("updates", fontsize=SMALL)
        axis.set_ylabel("validation loss", fontsize=SMALL)
        axis.tick_params(labelsize=TINY)
        axis.grid(color=GREY, alpha=0.2)
    _legend_below(figure, handles, across)
    return svg_text(figure, name)


def headline(runs: Iterable[str]) -> list[str]:
    """Return the runs whose curves are drawn: the methods of Table 1, one training seed of each.

    All of them where none is in that table, and those without bits in their name.
    """
    runs = list(runs)
    in_table = [run for run in runs if _IN_TABLE_1.search(run) or not _WIDTHS.search(run)]
    return in_table if any(_IN_TABLE_1.search(run) for run in in_table) else runs


def _legend_below(figure: Figure, handles: Mapping[str, Any], across: int) -> None:
    """Put one legend below all panels, as many names a line as there are panels."""
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=across,
        fontsize=TINY,
        frameon=False,
    )


def paired_svg(groups: Sequence[Group], name: str) -> str:
    """Return the Frechet distance of rows over their paired distance: a panel for each group.

    Args:
        groups: of `paired_rank.groups_of`.
        name: unique on the page.
    """
    count = len(groups)
    methods = sorted({point.method for group in groups for point in group.points})
    styles = {method: style(number) for number, method in enumerate(methods)}
    names_across = 2 * count
    height = 3.6 + 0.2 * -(-len(methods) // names_across)
    figure = Figure(figsize=(4.4 * count + 0.4, height), dpi=100, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    handles = {}

    for axis, group in zip(axes, groups, strict=True):
        for method in methods:
            points = [point for point in group.points if point.method == method]
            if points:
                x, y = [p.relative_l2 for p in points], [p.distance for p in points]
                look = {**styles[method], "ls": "none", "ms": 5}
                (handles[method],) = axis.plot(x, y, **look)

        axis.set(xscale="log", yscale="log")
        for ticks in (axis.xaxis, axis.yaxis):
            _plain_numbers(ticks)
        protocol = f"\n{group.protocol}" if group.protocol else ""
        axis.set_title(f"{group.model}, {group.steps} steps{protocol}", fontsize=9)
        axis.set_xlabel("relative L2 distance to the float model's images", fontsize=SMALL)
        axis.set_ylabel(f"Frechet distance ({group.features} features)", fontsize=SMALL)
        axis.tick_params(labelsize=TINY, which="both")
        axis.grid(color=GREY, alpha=0.2)
    _legend_below(figure, handles, names_across)
    return svg_text(figure, name)
