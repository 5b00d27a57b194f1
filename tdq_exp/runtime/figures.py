"""Pictures of a run: sample grids and step sizes over time; and how any figure is written."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tdq_exp.runtime import files

TIME_LABEL = "time step t (noise grows to the right)"
BLACK = "#000000"
MOST = 6  # curves that are drawn by name
FEW_CODES = 16  # those of 4 bits
RESOLUTION = 150  # dots per inch of a run's pictures
SIGNATURE = "tdq_exp"  # before the fingerprint in a picture
PNG_END = 12  # bytes of a PNG's last part


def sample_grid(
    rows: Mapping[str, NDArray[np.uint8]], path: Path, columns: int = 16, lines: int = 3
) -> int:
    """Draw image sets above each other, the same seeds in the same places.

    Args:
        rows: title -> uint8 `[N, H, W, C]`.
        path: PNG to write.
        columns: images side by side.
        lines: lines of images per set, at most.

    Returns:
        How many images of each set the picture shows.
    """
    count = min([columns * lines, *(len(images) for images in rows.values())])
    lines = -(-count // columns)

    figure = Figure(figsize=(columns * 0.55, len(rows) * (lines * 0.55 + 0.3)), dpi=RESOLUTION)
    axes = np.atleast_1d(figure.subplots(len(rows), 1))
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(
            _tile(images[:count], columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
        )
        axis.set_title(title, fontsize=8, loc="left", pad=3)
        axis.axis("off")

    figure.tight_layout(pad=0.3)
    save_figure(figure, path, images=True)
    return count


def _tile(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    count, height, width, channels = images.shape
    lines = -(-count // columns)
    sheet = np.full((lines * (height + 1), columns * (width + 1), channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet.squeeze(-1) if channels == 1 else sheet


def intervals_over_time(
    tables: Mapping[str, tuple[Tensor, Tensor]], path: Path, title: str
) -> None:
    """Draw the step size and the zero point of every activation quantizer.

    Where step sizes depend on t, they are curves over t; where none does, they are bars.

    Args:
        tables: quantizer -> (s, z): `[T]`, or `[1]` where it does not depend on t.
        path: PNG to write; an SVG goes beside it.
        title: of the picture.
    """
    named = {name.removesuffix("_quantizer"): table for name, table in tables.items()}
    timed = {name: table for name, table in named.items() if len(table[0]) > 1}
    if not timed:
        _bars(named, path, title)
        return

    figure = Figure(figsize=(8, 7), dpi=RESOLUTION)
    upper, lower = figure.subplots(2, 1, sharex=True)
    moving = _relative_curves(upper, {name: s for name, (s, _) in timed.items()}, "step size s(t)")
    upper.set_title(title)

    # The zero points of the same quantizers, in the same colours.
    steps = np.arange(max(len(s) for s, _ in timed.values()))
    for name, colour in moving.items():
        lower.plot(steps, timed[name][1].expand(len(steps)).numpy(), lw=1, color=colour, label=name)
    lower.set(xlabel=TIME_LABEL, ylabel="zero point z(t), code")
    _spread_codes(lower, [float(timed[name][1].max()) for name in moving])
    _legend_beside(lower)

    _save_both(figure, path)


def _spread_codes(axis: Any, largest: Sequence[float]) -> None:
    """Make the axis of zero points logarithmic beyond 16 codes if some stay below and some do not.

    Layers at 4 and at 8 bits would else share an axis on which the former are flat.
    """
    if min(largest) <= FEW_CODES < max(largest):
        axis.set_yscale("symlog", linthresh=FEW_CODES, linscale=2)
        ticks = [0, 4, 8, 12, 16, 32, 64, 128, 256]
        axis.set_yticks([tick for tick in ticks if tick <= max(largest) * 1.1])
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(f"zero point z(t), code\n(logarithmic beyond {FEW_CODES})")


def _bars(named: Mapping[str, tuple[Tensor, Tensor]], path: Path, title: str) -> None:
    """Draw step sizes that do not depend on t as bars, the zero points beside them."""
    names = list(named)
    figure = Figure(figsize=(8, 1.2 + 0.14 * len(names)), dpi=RESOLUTION)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))

    place = np.arange(len(names))
    left.barh(place, [float(s[0]) for s, _ in named.values()], color="C0", height=0.7)
    left.set(xlabel="step size s", xscale="log", title=title)
    left.set_yticks(place, names, fontsize=5)
    left.invert_yaxis()

    right.plot([float(z[0]) for _, z in named.values()], place, "o", ms=2.5, color="C1")
    right.set(xlabel="zero point z, code")
    for axis in (left, right):
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)

    _save_both(figure, path)


def _relative_curves(axis: Any, curves: Mapping[str, Tensor], label: str) -> dict[str, str]:
    """Draw positive quantities over t, each divided by its mean.

    The ones that change most are drawn by name, a curve thin and its mean over neighbouring steps
    thick; behind them stand the median and the spread of all.

    Returns:
        Name -> colour of those that are drawn by name.
    """
    relative = {name: curve.numpy() / float(curve.mean()) for name, curve in curves.items()}
    every = np.stack(list(relative.values()))
    steps = np.arange(every.shape[1])

    # All of them: their median, and how far they spread.
    low, middle, high = np.quantile(every, [0.05, 0.5, 0.95], axis=0)
    axis.fill_between(steps, low, high, color="0.88", label=f"5 to 95 % of {len(every)}")
    axis.plot(steps, middle, color="0.55", lw=1, label="median")

    # Those that change most.
    smooth = {name: _smooth(curve) for name, curve in relative.items()}
    moving = sorted(smooth, key=lambda name: float(np.ptp(smooth[name])), reverse=True)[:MOST]
    colours = {}
    for name in moving:
        line = axis.plot(steps, smooth[name], lw=1.2, label=name)[0]
        colours[name] = line.get_color()
        axis.plot(steps, relative[name], lw=0.4, alpha=0.25, color=colours[name])

    # What thick and thin lines are, in grey.
    axis.plot([], [], lw=1.2, color="0.3", label=f"thick: mean of {_width(len(steps))} steps")
    axis.plot([], [], lw=0.4, alpha=0.5, color="0.3", label="thin: every step")

    axis.set_xlim(steps[0], steps[-1])
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"{label} / mean")
    _legend_beside(axis)
    return colours


def _legend_beside(axis: Any) -> None:
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _save_both(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".svg"))


def _width(count: int) -> int:
    """Return over how many of `count` steps a curve is smoothed."""
    return max(count // 40, 1)


def _smooth(curve: NDArray[Any]) -> NDArray[Any]:
    width = _width(len(curve))
    padded = np.pad(curve.astype(np.float64), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="same")[
        width // 2 : width // 2 + len(curve)
    ]


def save_figure(figure: Figure, path: Path, images: bool = False) -> None:
    """Write a figure without a date, so that the same figure is the same file.

    Args:
        figure: the figure.
        path: a PNG or an SVG.
        images: whether it shows images, whose colours are all kept; a chart has enough of 256.
    """
    buffer = io.BytesIO()
    if path.suffix == ".svg":
        with rc_context(_reproducible(path.stem)):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        files.write_bytes(path, buffer.getvalue() + _svg_checksum(buffer.getvalue()))
        return

    figure.savefig(buffer, format="png", metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB")
    if not images:
        # Median cut would drop the colours of few pixels, such as the ends of a scale.
        picture = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with files.replacing(path) as part:
        picture.save(part, format="PNG", optimize=True)


def sign(path: Path, of: str) -> None:
    """Write into a picture whose it is, for `signature`; its pixels stay as they are.

    Args:
        path: a PNG, or an SVG that `save_figure` wrote; where there is none, nothing is done.
        of: fingerprint of the stage that it is drawn from.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    if path.suffix == ".svg":
        picture = content[: content.rfind(b"<!--")] + f"<!-- {SIGNATURE} {of} -->\n".encode()
        files.write_bytes(path, picture + _svg_checksum(picture))
        return

    # A text of a PNG: length, kind, content, CRC-32; before the last part, IEND.
    text = f"{SIGNATURE}\0{of}".encode("latin-1")
    part = struct.pack(">I", len(text)) + b"tEXt" + text
    part += struct.pack(">I", zlib.crc32(b"tEXt" + text))
    files.write_bytes(path, content[:-PNG_END] + part + content[-PNG_END:])


def signature(path: Path) -> str | None:
    """Return whose a whole picture is, or None: an earlier version did not write it."""
    if path.suffix == ".svg":
        found = re.findall(rf"<!-- {SIGNATURE} (\w+) -->".encode(), path.read_bytes()[-200:])
        return found[-1].decode() if found else None
    with Image.open(path, formats=["PNG"]) as image:
        image.load()  # texts may follow the pixels
        return image.info.get(SIGNATURE)


def is_whole(path: Path) -> bool:
    """Return whether a file is a PNG or an SVG that matches its checksums.

    An SVG of an earlier version has none: it is whole if it has an end.
    """
    if not path.is_file():  # a pipe would wait for ever
        return False
    if path.suffix == ".svg":
        content = path.read_bytes()
        picture = content[: content.rfind(b"<!--")]
        return content.endswith(b"</svg>\n") or content == picture + _svg_checksum(picture)

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return path.read_bytes()[-12:-8] == bytes(4)  # the last part, IEND, is empty


def _svg_checksum(content: bytes) -> bytes:
    """Return the comment that ends an SVG: the CRC-32 of all before it."""
    return f"<!-- crc32 {zlib.crc32(content):08x} -->\n".encode()


def svg_text(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element of a page.

    Letters stay text; what is black becomes the page's own colour of text, and nothing is painted
    behind.

    Args:
        figure: the figure.
        name: identifiers inside of the element are made of it; each figure of a page has its own.
    """
    buffer = io.StringIO()
    with rc_context(_reproducible(name)):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)

    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(BLACK, "currentColor")


def _reproducible(name: str) -> dict[Any, Any]:
    return {"svg.hashsalt": name, "svg.fonttype": "none"}
