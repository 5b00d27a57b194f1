"""Grids: which integers a quantizer may use.

| grid      | codes                         | zero point | for |
|-----------|-------------------------------|------------|-----|
| symmetric | -p..p, p = 2^(b-1) - 1        | 0          | weights in QAT |
| affine    | 0..2^b - 1                    | integer    | activations, and weights in PTQ |

The release uses fewer: -(h-1)..(h-1) with h = (2^b - 1) // 2 (4 bits: 13 levels, 3 bits: 5), and
0..2^b - 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdq_exp.config.setting import FEWEST_BITS, MOST_BITS


@dataclass(frozen=True)
class Grid:
    """Codes n..p.

    Args:
        bits: 2 to 16.
        symmetric: -p..p without a zero point, or 0..p with one.
        reduced: the release's smaller grids.

    Raises:
        ValueError: for a number of bits that is not a whole number from 2 to 16.
    """

    bits: int
    symmetric: bool
    reduced: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.bits, bool)
            or not isinstance(self.bits, int)
            or not FEWEST_BITS <= self.bits <= MOST_BITS
        ):
            raise ValueError(
                f"bits={self.bits}: must be a whole number from {FEWEST_BITS} to {MOST_BITS}"
            )
        if self.symmetric and self.p < 1:
            raise ValueError(
                f"bits={self.bits}: the release's symmetric grid has no level but 0 below 3 bits"
            )

    @property
    def p(self) -> int:
        """Return the largest code."""
        if self.symmetric:
            return (2**self.bits - 1) // 2 - 1 if self.reduced else 2 ** (self.bits - 1) - 1
        return 2**self.bits - (2 if self.reduced else 1)

    @property
    def n(self) -> int:
        """Return the smallest code."""
        return -self.p if self.symmetric else 0
