"""Intervals: where a quantizer's step size comes from.

| interval   | s                                   | parameters |
|------------|-------------------------------------|------------|
| `Static`   | softplus(rho)                       | one |
| `PerStep`  | softplus(rho_g), g = floor(t G / T) | one for each of G groups of time steps |
| `Temporal` | softplus(f(enc(t)))                 | TDQ: a small network of t; see `generators` |
| `Dynamic`  | (max x - min x) / (p - n)           | none: read from the input |
| `MaxAbs`   | max|x| / p                          | none |
| `LookupTable`    | s_t                                 | none: any of the above, baked |

All learned ones share one parametrisation, so that a comparison of two of them compares intervals: `Static` is
`Temporal` with zero weights.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdq_exp.quant.ops import at
from tdq_exp.quant.time import TimeContext


def inverse_softplus(s: float) -> float:
    """rho with softplus(rho) = s, for s > 0, without overflow: `s + ln(1 - e^-s)`."""
    return s + math.log(-math.expm1(-s))


class Interval(nn.Module):
    """A source of step sizes. Calling it gives s > 0, 0-dim or `[B]`."""

    timed = False  # does s depend on t?
    dynamic = False  # is s read from the input, and z with it?

    def start(self, s: float) -> None:
        """Sets the start value, for every time step alike."""
        raise NotImplementedError(type(self).__name__)

    def table(self) -> Tensor:
        """s for every time step, `[T]`, or `[1]` if it does not depend on t. Without gradient."""
        raise NotImplementedError(type(self).__name__)

    def lookup(self) -> tuple[Tensor, Tensor] | None:
        """Return (table `[T]`, 0-dim t) where s is an entry of a table, one for the whole batch, else None.

        A kernel can then read the entry itself, in place of a gather before it.
        """
        return None


class LookupTable(Interval):
    """A baked interval: one step size for each time step, or one for all.

    Args:
        step_sizes: `[T]` or `[1]`.
        time: the network's time step.
    """

    def __init__(self, step_sizes: Tensor, time: TimeContext | None) -> None:
        super().__init__()
        self.time = time
        self.timed = len(step_sizes) > 1
        self.step_sizes: Tensor
        self.register_buffer("step_sizes", step_sizes.clone())

    def forward(self, x: Tensor | None = None) -> Tensor:
        if not self.timed:
            return self.step_sizes[0]
        assert self.time is not None
        return at(self.step_sizes, self.time.t)

    def table(self) -> Tensor:
        return self.step_sizes

    def lookup(self) -> tuple[Tensor, Tensor] | None:
        """Return (table, t) where all samples are at one time step."""
        if not self.timed or self.time is None or self.time.t.dim():
            return None
        return self.step_sizes, self.time.t
