"""Pictures of a run: sample grids and intervals over time. The only importer of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor


def sample_grid(rows: Mapping[str, NDArray[np.uint8]], path: Path, columns: int = 16, lines: int = 3) -> None:
    """Image sets above each other, the same seeds in the same places.

    Args:
        rows: title -> uint8 `[N, H, W, C]`.
        path: PNG to write.
        columns: images side by side.
        lines: lines of images per set.
    """
    count = min([columns * lines, *(len(images) for images in rows.values())])
    lines = -(-count // columns)
    figure = Figure(figsize=(columns * 0.55, len(rows) * (lines * 0.55 + 0.3)), dpi=150)
    axes = np.atleast_1d(figure.subplots(len(rows), 1))
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(_tile(images[:count], columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=8, loc="left", pad=3)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    _save(figure, path)


def _tile(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    count, height, width, channels = images.shape
    lines = -(-count // columns)
    sheet = np.full((lines * (height + 1), columns * (width + 1), channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet.squeeze(-1) if channels == 1 else sheet


def intervals_over_time(tables: Mapping[str, Tensor], path: Path, title: str, most: int = 6) -> None:
    """Step size over t relative to its mean: the layers that change most, and the spread of all.

    Args:
        tables: quantizer -> `[T]` (or `[1]`, static).
        path: PNG to write; an SVG goes beside it.
        title: of the picture.
        most: number of layers drawn by name: s(t) itself faint, its mean over T / 40 neighbouring steps strong.
    """
    figure = Figure(figsize=(8, 4.2), dpi=150)
    axis = figure.subplots()
    timed = {name: table.numpy() / float(table.mean()) for name, table in tables.items() if len(table) > 1}
    if timed:
        curves = np.stack(list(timed.values()))
        t = np.arange(curves.shape[1])
        low, middle, high = np.quantile(curves, [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(t, low, high, color="0.88", label="5 to 95 % of quantizers")
        axis.plot(t, middle, color="0.55", lw=1, label="median")
        moving = sorted(timed, key=lambda name: float(np.ptp(_smooth(timed[name]))), reverse=True)[:most]
        for name in moving:
            line = axis.plot(t, _smooth(timed[name]), lw=1.2, label=name.removesuffix("_quantizer"))[0]
            axis.plot(t, timed[name], lw=0.4, alpha=0.25, color=line.get_color())
        axis.set_xlim(0, len(t) - 1)
    else:
        axis.axhline(1.0, color="0.55", label=f"{len(tables)} static intervals")
    axis.set(xlabel="time step t (noise grows to the right)", ylabel="step size s(t) / mean", title=title)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    _save(figure, path)
    _save(figure, path.with_suffix(".svg"))


def distance_over_bits(
    methods: Mapping[str, Mapping[int, float]], floor: float | None, path: Path, title: str, label: str
) -> None:
    """Distance over the activations' bit width, a line per method.

    Args:
        methods: name -> bits -> distance.
        floor: the float model's distance, if known: a dashed line.
        path: PNG to write; an SVG goes beside it.
        title: of the picture.
        label: of the distance, with its features.
    """
    figure = Figure(figsize=(6, 4), dpi=150)
    axis = figure.subplots()
    for (name, values), marker in zip(methods.items(), "osD^v<>", strict=False):
        bits = sorted(values, reverse=True)
        axis.plot(bits, [values[b] for b in bits], marker=marker, ms=4, lw=1.3, label=name)
    if floor is not None:
        axis.axhline(floor, color="0.4", ls="--", lw=1, label="float")
    every = sorted({b for values in methods.values() for b in values}, reverse=True)
    axis.set_xticks(every)
    axis.invert_xaxis()
    axis.set_yscale("log")
    axis.set(xlabel="bits of activations", ylabel=label, title=title)
    axis.title.set_fontsize(9)
    axis.grid(axis="y", which="both", color="0.92")
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)
    _save(figure, path.with_suffix(".svg"))


def _smooth(curve: NDArray[Any]) -> NDArray[Any]:
    width = max(len(curve) // 40, 1)
    padded = np.pad(curve.astype(np.float64), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="same")[width // 2 : width // 2 + len(curve)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with rc_context({"svg.hashsalt": path.stem}):  # the same picture is the same file
        figure.savefig(path, metadata=metadata)
