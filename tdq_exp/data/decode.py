"""One picture of a file, as a viewer shows it: upright, in 8 bits, on white where transparent."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

_BROKEN = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    EOFError,
    Image.DecompressionBombError,
    struct.error,
)

# EXIF's orientation -> what turns the picture upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL takes the A of LAB for transparency, and knows no white of these.
_UNREADABLE = ("LAB", "HSV")


def decode(raw: bytes, name: str) -> Image.Image:
    """Return a picture, whole and as a viewer shows it.

    The orientation that a camera wrote (EXIF) is applied. Transparent pixels are composited on
    white: what colour lies behind them is an accident. 16-bit gray is divided by 257. Of several
    frames or pages the first one is taken.

    Args:
        raw: content of the file.
        name: of the file, for messages.

    Raises:
        ValueError: if it is damaged, no image, or of numbers or colours that have no black and
            white.
    """
    if not raw:
        raise ValueError(f"{name}: not a whole image (the file is empty); replace or remove it")

    try:
        image: Any = Image.open(io.BytesIO(raw))
        image.load()  # a truncated file is found here, not at opening
        image = _upright(image)
    except _BROKEN as error:
        unknown = isinstance(error, UnidentifiedImageError)  # Pillow names an object in memory
        reason = "of no known format" if unknown else first_line(error)
        raise ValueError(f"{name}: not a whole image ({reason}); replace or remove it") from error

    if image.mode in _UNREADABLE:
        raise ValueError(
            f"{name}: holds the colours {image.mode}, which need a profile; convert it to RGB"
        )

    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.round(levels).astype(np.uint8))

    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name}: holds {'32-bit integers' if image.mode == 'I' else 'real numbers'}, which"
            " have no defined black and white level; convert it to 8 bits"
        )

    transparent = "A" in image.getbands() or "transparency" in image.info
    return _on_white(image) if transparent else image


def _upright(image: Image.Image) -> Image.Image:
    """Return a picture as its camera was held.

    Pillow's `exif_transpose` writes all other EXIF back, and fails where a camera's is odd.
    """
    orientation: Any = image.getexif().get(_ORIENTATION)
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def decode_cell(cell: dict[str, Any], name: str) -> Image.Image:
    """Return the image of a cell of a table: its bytes, or its file."""
    try:
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{name}: can't be read ({error.strerror}); replace or remove it"
        ) from error
    return decode(raw, name)
