"""The last value of a computation, kept while its inputs stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cache(Generic[T]):
    """The last value that was computed, for as long as its key stays the same.

    Copies and pickles of it are empty: a cached tensor may belong to the graph of one network.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, T] | None = None

    def get(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the value of a key, computed if the last call had another key."""
        held = self._held  # read once: another thread may replace it meanwhile
        if held is None or held[0] != key:
            held = self._held = (key, compute())
        return held[1]

    def clear(self) -> None:
        """Drop the value."""
        self._held = None

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()
