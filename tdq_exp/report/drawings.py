"""Figures, drawn from the numbers that were measured for them. The same numbers, the same bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tdq_exp.report import charts
from tdq_exp.report.axes import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    SMALL,
    TINY,
    Numbers,
    finish,
    short_name,
    side_by_side,
    stacked,
    with_missing,
)
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.runtime.figures import TIME_LABEL, save_figure, svg_text

COLOURFUL = ("grids",)  # kinds of figures that show images, whose colours are all kept
PAPER = {"deviation > 0.5": 0.621, "deviation > 0.7": 0.388}  # So et al., section 3


def draw(figure: FigureManifest, record: Numbers, path: Path) -> Path:
    """Draw a figure and return its file.

    Args:
        figure: the manifest.
        record: its numbers.
        path: PNG to write.
    """
    title = f"{figure.title}, scale {record['scale']}"
    save_figure(build(figure, record, title), path, images=figure.kind in COLOURFUL)
    return path


def svg(figure: FigureManifest, record: Numbers, name: str) -> str:
    """Return a figure as an SVG element, for a page, which has its title above.

    Args:
        figure: the manifest.
        record: its numbers.
        name: unique on the page.
    """
    return svg_text(build(figure, record), name)


def build(figure: FigureManifest, record: Numbers, title: str = "") -> Figure:
    """Return a figure, ready to be saved.

    Args:
        figure: the manifest.
        record: its numbers.
        title: above it; nothing if empty.
    """
    drawn = BUILDERS[figure.kind](record)
    if title:
        drawn.suptitle(title, fontsize=10)
    return drawn


# --- Figure 2


def _activations(record: Numbers) -> Figure:
    columns = list(record["columns"].values())
    figure = Figure(figsize=(11, 4.6 * len(columns)), dpi=120, layout="constrained")

    for part, column in zip(stacked(figure, len(columns)), columns, strict=True):
        part.suptitle(f"{column['model']}: float network", fontsize=9)
        upper, lower = part.subfigures(2, 1)

        # A few tensors, from the first to the last layer.
        tensors = column["boxes"]["tensors"]
        axes = upper.subplots(1, len(tensors))
        for axis, (name, boxes) in zip(axes, tensors.items(), strict=True):
            _boxes(axis, short_name(name), column["boxes"]["t"], boxes)
        axes[0].set_ylabel("activation", fontsize=SMALL)

        # r of every tensor, and how many are beyond the bounds.
        left, right = lower.subplots(1, 2, width_ratios=(2, 1))
        _correlations(left, column["tensors"])
        _shares(right, column)
    return figure


def _boxes(axis: Any, name: str, t: Sequence[int], boxes: Sequence[Sequence[float]]) -> None:
    """Draw quantiles of a tensor over t: box 25 to 75 %, whiskers 5 to 95 %, dots the extremes."""
    stats = [
        {"fliers": [low, high], "whislo": q05, "q1": q25, "med": q50, "q3": q75, "whishi": q95}
        for low, q05, q25, q50, q75, q95, high in boxes
    ]
    axis.bxp(
        stats,
        positions=range(len(t)),
        widths=0.6,
        flierprops={"marker": ".", "ms": 2, "mec": ORANGE, "mfc": ORANGE},
        medianprops={"color": ORANGE},
        boxprops={"color": BLUE},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
    )

    ends = [0, len(t) // 2, len(t) - 1]
    axis.set_xticks(ends, [str(t[end]) for end in ends])
    axis.set_title(name, fontsize=TINY)
    axis.set_xlabel("time step t", fontsize=SMALL)
    axis.tick_params(labelsize=TINY)


def _correlations(axis: Any, tensors: Mapping[str, Mapping[str, float]]) -> None:
    """Draw |r| of every tensor's standard deviation with t, in the order of the network."""
    r = [abs(values["deviation"]) for values in tensors.values()]
    axis.bar(range(len(r)), r, color=BLUE, width=0.8)
    for bound in (0.5, 0.7):
        axis.axhline(bound, color=ORANGE, lw=1, ls="--")

    axis.set(ylim=(0, 1), xlim=(-0.7, len(r) - 0.3))
    axis.set_xlabel("tensor, from the first layer to the last", fontsize=SMALL)
    axis.set_ylabel("|r| of standard deviation and t", fontsize=SMALL)
    axis.tick_params(labelsize=TINY)


def _shares(axis: Any, column: Numbers) -> None:
    """Draw the shares of tensors beyond 0.5 and 0.7 beside the paper's, and what makes them."""
    held = column["held"]
    bars = {
        "the paper (DDIM)": PAPER,
        "here": held["nothing"],
        "here, t held in the network": held["t"],
        "here, x_t held": held["x_t"],
    }

    place = np.arange(len(bars))
    for offset, (key, colour) in enumerate(zip(PAPER, (BLUE, GREEN), strict=True)):
        values = [100 * shares[key] for shares in bars.values()]
        label = f"|r| > {key.split()[-1]}"
        drawn = axis.barh(place + 0.38 * offset, values, 0.36, color=colour, label=label)
        axis.bar_label(drawn, fmt="%.1f", fontsize=TINY, padding=2)

    axis.set_yticks(place + 0.19, list(bars), fontsize=TINY)
    axis.invert_yaxis()
    axis.set_xlim(0, 118)
    axis.set_xlabel("share of tensors, %", fontsize=SMALL)
    axis.tick_params(axis="x", labelsize=TINY)
    axis.legend(
        fontsize=TINY, frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.2), ncols=2
    )


# --- Figure 3


def _errors(record: Numbers) -> Figure:
    figure, axes = side_by_side(record, height=3.8)
    for axis, column in zip(axes, record["columns"].values(), strict=True):
        for number, (label, run) in enumerate(column["runs"].items()):
            style = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 3, "lw": 1.3}
            axis.plot(column["t"], run["truncation"], label=f"{label}: truncation", **style)
            axis.plot(column["t"], run["rounding"], ls="--", label=f"{label}: rounding", **style)

        axis.set_yscale("log")
        axis.set_xlabel(TIME_LABEL, fontsize=8)
        axis.set_ylabel("error / power, mean of all quantizers", fontsize=8)
        axis.grid(color=GREY, alpha=0.2)
        finish(axis, column)
    return figure


# --- Figure 9


def _ranges(record: Numbers) -> Figure:
    columns = [column for column in record["columns"].values() if column["runs"]]
    rows = sum(len(column["runs"]) for column in columns)
    figure = Figure(figsize=(12, 2.4 * max(rows, 1) + 0.6), dpi=120, layout="constrained")

    for part, column in zip(stacked(figure, len(columns)), columns, strict=True):
        part.suptitle(with_missing(column), fontsize=9)
        most = max(len(run["quantizers"]) for run in column["runs"].values())
        axes = part.subplots(len(column["runs"]), most, squeeze=False, sharex=True, sharey="col")
        for line, (label, run) in zip(axes, column["runs"].items(), strict=True):
            for axis, (name, values) in zip(line, run["quantizers"].items(), strict=True):
                _range(axis, column["t"], values)
                axis.set_title(short_name(name), fontsize=TINY)
            line[0].set_ylabel(label, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("time step t", fontsize=SMALL)
        axes[0, -1].legend(
            fontsize=TINY, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
        )
    return figure


def _range(axis: Any, t: Sequence[int], values: Numbers) -> None:
    """Draw what an activation takes, and what its grid covers: s (n - z) to s (p - z)."""
    axis.fill_between(t, values["q01"], values["q99"], color=BLUE, alpha=0.3, lw=0, label="1..99 %")
    for key in ("low", "high"):
        label = "minimum, maximum" if key == "low" else None
        axis.plot(t, values[key], color=BLUE, lw=0.7, label=label)
    for key in ("grid_low", "grid_high"):
        label = "covered by the grid" if key == "grid_low" else None
        axis.plot(t, values[key], color=ORANGE, lw=1.6, ls="--", label=label)
    axis.tick_params(labelsize=TINY)


# --- Layers


def _layers(record: Numbers) -> Figure:
    columns = [column for column in record["columns"].values() if column["runs"]]
    heights = [max(len(run["sqnr"]) for run in column["runs"].values()) for column in columns]
    figure = Figure(figsize=(13, 0.6 + 0.115 * sum(heights) + len(columns)), dpi=120)
    figure.set_layout_engine("constrained")

    for part, column in zip(stacked(figure, len(columns), heights), columns, strict=True):
        part.suptitle(with_missing(column), fontsize=9)
        runs = column["runs"]
        widths = [3, 1] * len(runs)
        axes = part.subplots(1, 2 * len(runs), sharey=True, width_ratios=widths, squeeze=False)[0]
        for number, (label, run) in enumerate(runs.items()):
            image = _noise(axes[2 * number], label, column["t"], run)
            _alone(axes[2 * number + 1], run)
        bar = part.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
        bar.set_label("signal to quantization noise of the output, dB", fontsize=SMALL)
        bar.ax.tick_params(labelsize=TINY)
    return figure


def _noise(axis: Any, label: str, t: Sequence[int], run: Numbers) -> Any:
    """Draw the signal-to-quantization-noise of every layer's output over t as a map."""
    names = list(run["sqnr"])
    values = np.array([run["sqnr"][name] for name in names])
    edges = (-0.5, len(t) - 0.5, len(names) - 0.5, -0.5)
    image = axis.imshow(
        values, aspect="auto", cmap="viridis", vmin=0, vmax=30, extent=edges, interpolation="none"
    )

    ticks = [0, len(t) // 2, len(t) - 1]
    axis.set_xticks(ticks, [str(t[tick]) for tick in ticks])
    axis.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=6)
    axis.tick_params(axis="x", labelsize=TINY)
    axis.set_title(label, fontsize=8)
    axis.set_xlabel("time step t", fontsize=SMALL)
    return image


def _alone(axis: Any, run: Numbers) -> None:
    """Draw the error of x_0 that each quantizer makes when it alone is on, the largest by share."""
    errors = [max(run["errors"][name], 1e-9) for name in run["sqnr"]]
    largest = max(run["shares"], key=run["shares"].__getitem__)
    axis.barh(range(len(errors)), errors, color=ORANGE, height=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("error of $x_0$, alone", fontsize=TINY)
    axis.set_title(f"{short_name(largest)}:\n{run['shares'][largest]:.1%} of all", fontsize=TINY)
    axis.tick_params(axis="x", labelsize=TINY)
    axis.tick_params(axis="y", left=False, labelleft=False)


# --- Figures 5 to 7


def _grids(record: Numbers) -> Figure:
    strips = [
        (f"{column['model']}: {label}", run["png"])
        for column in record["columns"].values()
        for label, run in column["runs"].items()
    ]
    missing = [
        f"{column['model']}: {', '.join(column['missing'])}"
        for column in record["columns"].values()
        if column["missing"]
    ]

    figure = Figure(figsize=(9, 0.5 + 0.82 * len(strips)), dpi=120, layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (title, png) in zip(axes, strips, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=SMALL, loc="left", pad=2)
        axis.axis("off")

    if missing:
        figure.supxlabel(f"Missing: {'; '.join(missing)}", fontsize=TINY, x=0.01, ha="left")
    return figure


BUILDERS: dict[str, Callable[[Numbers], Figure]] = {
    "activations": _activations,
    "errors": _errors,
    "steps": charts.distance_over_steps,
    "length": charts.distance_over_updates,
    "ranges": _ranges,
    "layers": _layers,
    "grids": _grids,
}
