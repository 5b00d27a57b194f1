"""Pictures of a run: sample grids and intervals over time. The only importer of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdq_exp.runtime import files


def sample_grid(
    rows: Mapping[str, NDArray[np.uint8]], path: Path, columns: int = 16, lines: int = 3
) -> None:
    """Draw image sets above each other, the same seeds in the same places.

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
        axis.imshow(
            _tile(images[:count], columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
        )
        axis.set_title(title, fontsize=8, loc="left", pad=3)
        axis.axis("off")

    figure.tight_layout(pad=0.3)
    save_figure(figure, path)


def _tile(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    count, height, width, channels = images.shape
    lines = -(-count // columns)
    sheet = np.full((lines * (height + 1), columns * (width + 1), channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet.squeeze(-1) if channels == 1 else sheet


def intervals_over_time(tables: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw the step size over t of every quantizer: `[T]`, or `[1]` if it is static."""
    timed = {
        name.removesuffix("_quantizer"): table for name, table in tables.items() if len(table) > 1
    }
    curves_over_time(timed, path, title, "step size s(t)", rest=f"{len(tables)} static intervals")


def curves_over_time(
    curves: Mapping[str, Tensor],
    path: Path,
    title: str,
    label: str,
    *,
    t: Tensor | None = None,
    most: int = 6,
    rest: str = "",
) -> None:
    """Draw positive quantities over t, relative to their means.

    The layers that change most are drawn by name, and the spread of all.

    Args:
        curves: layer -> `[S]`.
        path: PNG to write; an SVG goes beside it.
        title: of the picture.
        label: of the quantity.
        t: the time steps, `[S]`, if not 0..S-1.
        most: number of layers drawn by name: the curve itself faint, its mean over S / 40
            neighbouring steps strong.
        rest: label of the flat line that is drawn where there is no curve.
    """
    figure = Figure(figsize=(8, 4.2), dpi=150)
    axis = figure.subplots()
    if curves:
        relative = {name: curve.numpy() / float(curve.mean()) for name, curve in curves.items()}
        every = np.stack(list(relative.values()))

        steps = np.arange(every.shape[1]) if t is None else t.numpy()

        # All layers: their median, and how far they spread.
        low, middle, high = np.quantile(every, [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(steps, low, high, color="0.88", label=f"5 to 95 % of {len(every)}")
        axis.plot(steps, middle, color="0.55", lw=1, label="median")

        # Those that change most, by name: the mean over neighbours strong, the curve faint.
        moving = sorted(
            relative, key=lambda name: float(np.ptp(_smooth(relative[name]))), reverse=True
        )[:most]
        for name in moving:
            line = axis.plot(steps, _smooth(relative[name]), lw=1.2, label=name)[0]
            axis.plot(steps, relative[name], lw=0.4, alpha=0.25, color=line.get_color())

        axis.set_xlim(steps[0], steps[-1])
    else:
        axis.axhline(1.0, color="0.55", label=rest)

    axis.set(xlabel="time step t (noise grows to the right)", ylabel=f"{label} / mean", title=title)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)

    figure.tight_layout()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".svg"))


def _smooth(curve: NDArray[Any]) -> NDArray[Any]:
    width = max(len(curve) // 40, 1)
    padded = np.pad(curve.astype(np.float64), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="same")[
        width // 2 : width // 2 + len(curve)
    ]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure without a date, so that the same figure is the same file."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    kind = path.suffix.removeprefix(".")
    with rc_context({"svg.hashsalt": path.stem}), files.replacing(path) as part:
        figure.savefig(part, format=kind, metadata=metadata)


def is_whole(path: Path) -> bool:
    """Return whether a file is a PNG whose parts match their checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return path.read_bytes()[-12:-8] == bytes(4)  # the last part, IEND, is empty
