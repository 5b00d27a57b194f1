"""Holding images out of a set that has no held-out split of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
HOLDOUT = 20  # every so many-th image


def check_holdout(holdout: int) -> None:
    """Refuse a number that holds nothing, or everything, out.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(holdout, int) or isinstance(holdout, bool) or holdout < 2:
        raise ValueError(
            f"data.source.holdout={holdout}: at least 2, every so many-th image is held out"
        )


def part_of(items: Iterable[T], holdout: int, split: str) -> Iterator[T]:
    """Yield every so many-th item for `validation`, beginning with the first, or all others."""
    for i, item in enumerate(items):
        if (i % holdout == 0) == (split == "validation"):
            yield item
