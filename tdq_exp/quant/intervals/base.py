"""Intervals: where a quantizer's step size comes from.

| interval       | s                                   | parameters |
|----------------|-------------------------------------|------------|
| `Static`       | softplus(rho)                       | one |
| `PerStep`      | softplus(rho_g), g = floor(t G / T) | one for each of G groups of time steps |
| `Temporal`     | softplus(f(enc(t)))                 | TDQ: a small network of t |
| `Dynamic`      | (max x - min x) / (p - n)           | none: read from the input |
| `MaxAbs`       | max|x| / p                          | none: read from a weight |
| `ChannelRange` | as `Dynamic`, by output channel     | none: read from a weight |
| `LookupTable`  | s_t                                 | none: any of the first three, baked |

All have one contract: `interval(x, grid)` returns (s, z or None). The learned ones share one
parametrisation, so that a comparison of two of them compares intervals: `Static` is `Temporal`
with zero weights.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdq_exp.quant.grid import Grid
from tdq_exp.quant.ops import at
from tdq_exp.quant.time import TimeContext


def inverse_softplus(s: float) -> float:
    """Return rho with softplus(rho) = s, for s > 0, without overflow: `s + ln(1 - e^-s)`."""
    return s + math.log(-math.expm1(-s))


class Interval(nn.Module):
    """A source of step sizes.

    A source that needs no input defines `start`, `step_size` and `table`. One that reads the input
    defines `forward` alone and sets `dynamic`.
    """

    # Whether s depends on t.
    time_dependent = False
    # Whether s is read from what is quantized: then there is nothing to calibrate or to bake.
    dynamic = False
    # Whether it holds what a quantizer computed from another interval.
    baked = False

    def start(self, s: float) -> None:
        """Set the start value, for every time step alike. Nothing happens where s follows x."""
        if not self.dynamic:
            raise NotImplementedError(type(self).__name__)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Return (s, z) for a tensor.

        Args:
            x: what is quantized, float32.
            grid: the codes.

        Returns:
            s > 0: 0-dim, or with one value for each element of x's first axis. z: None, except
            where the range that gives s determines it too; then an integer held as float, of s's
            shape.
        """
        s = self.step_size()
        assert s is not None
        return s, None

    def step_size(self) -> Tensor | None:
        """Return s at the current time step, 0-dim or `[B]`; None if it takes x to know it."""
        return None

    def table(self) -> Tensor | None:
        """Return s for every time step, `[T]`, or `[1]` if it does not depend on t.

        Without gradient; None if it takes x to know s.
        """
        return None

    def lookup(self) -> tuple[Tensor, Tensor] | None:
        """Return (table `[T]`, 0-dim t) where s is one entry of a table for a whole batch, or None.

        A kernel can then read the entry itself, in place of a gather before it.
        """
        return None


class LookupTable(Interval):
    """A baked interval: one step size for each time step, or one for all.

    Args:
        step_sizes: `[T]` or `[1]`.
        time: the network's time step.
    """

    baked = True

    def __init__(self, step_sizes: Tensor, time: TimeContext | None) -> None:
        super().__init__()
        self.time = time
        self.time_dependent = len(step_sizes) > 1
        self.step_sizes: Tensor
        self.register_buffer("step_sizes", step_sizes.clone())

    def step_size(self) -> Tensor:
        """Return s at the current time step."""
        if not self.time_dependent:
            return self.step_sizes[0]
        assert self.time is not None
        return at(self.step_sizes, self.time.t)

    def table(self) -> Tensor:
        """Return the table."""
        return self.step_sizes

    def lookup(self) -> tuple[Tensor, Tensor] | None:
        """Return (table, t) where all samples are at one time step."""
        if not self.time_dependent or self.time is None or self.time.t.dim():
            return None
        return self.step_sizes, self.time.t
