"""The metrics that a table shows beside the Frechet distance, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """A metric beside the Frechet distance.

    Args:
        keys: in a row; the numbers of several share one column.
        name: for readers.
        inception_name: the name that Inception's features have a right to.
        digits: after the point.
    """

    keys: tuple[str, ...]
    name: str
    inception_name: str
    digits: int = 2

    def text(self, numbers: Sequence[float | None]) -> str:
        """Return the numbers of the keys as one text."""
        texts = ["-" if number is None else fixed(number, self.digits) for number in numbers]
        return " / ".join(texts)


# In the order of the columns.
SECOND = (
    Shown(("isc_mean",), "inception-style score", "IS"),
    Shown(("kid_mean",), "kernel distance", "KID", digits=4),
    Shown(("precision", "recall"), "precision / recall", "precision / recall"),
)


def fixed(number: float, digits: int, sign: str = "") -> str:
    """Return a number with so many digits after the point; zero is not negative.

    Args:
        number: the number.
        digits: after the point.
        sign: `+` for a sign before what is not negative, too.
    """
    return f"{round(number, digits) + 0.0:{sign}.{digits}f}"
