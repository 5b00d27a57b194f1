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
parametrisation, so that a comparison of two of them compares intervals: `Static` is `Temporal` with
zero weights.

An interval of one's own is two classes, and nothing that trains, reconstructs, bakes or exports
knows them by name:

- a subclass of `Interval`, which says by class attributes and by `bank` what it needs;
- a subclass of `Intervals`, which gives every quantizer one: `tdq.interval._target_` names it.

Parameters of its own train in the group that `parameter_group` names. Parameters that all
quantizers share lie in a subclass of `Bank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from tdq_exp.quant.grid import Grid
from tdq_exp.quant.ops import at
from tdq_exp.quant.time import TimeContext


def inverse_softplus(s: float) -> float:
    """Return rho with softplus(rho) = s, for s > 0, without overflow: `s + ln(1 - e^-s)`."""
    return s + math.log(-math.expm1(-s))


def _lacks(part: object, method: str) -> str:
    """Return what is said of a user's own class that lacks a method which is needed."""
    return f"{type(part).__name__}: define `{method}`; see {__name__}"


class Bank(nn.Module):
    """Parameters that the intervals of several quantizers share: a row for each of them.

    The network owns it, as `generators`, and saves it once. An interval holds it in a tuple: then
    it is no part of the interval.
    """

    parameter_group = "generators"

    @property
    def draws(self) -> bool:
        """Return whether it draws random numbers; if so, it is prepared at the start of a pass."""
        return False

    def subset(self, rows: Sequence[int]) -> Bank:
        """Return a trainable copy of some rows, in this order, for the fit of some quantizers.

        Its state dict is what a finished block keeps on disk.
        """
        raise NotImplementedError(_lacks(self, "subset"))

    def take_back(self, part: Bank) -> None:
        """Copy the rows of a `subset` back."""
        raise NotImplementedError(_lacks(self, "take_back"))

    def prepare(self, compiled: bool) -> None:
        """Compute, before a training pass, what its blocks are to read at the current time step.

        For a bank that computes all rows at once: within the first block that reads one, they would
        be missing in the others.

        Args:
            compiled: for blocks that torch compiles, or for those that recompute activations.
        """

    def forget(self) -> None:
        """Drop what is kept of the last forward pass, with its graph."""


def bank_of(net: nn.Module) -> Bank | None:
    """Return the bank of a network, or None if its intervals share nothing."""
    return next((module for module in net.modules() if isinstance(module, Bank)), None)


class Interval(nn.Module):
    """A source of step sizes.

    A source that needs no input defines `start`, `step_size` and `table`. One that reads the input
    defines `forward` alone and sets `dynamic`. One that reads a bank defines `bank`, `row` and
    `reading` as well.
    """

    # Whether s depends on t.
    time_dependent = False
    # Whether s is read from what is quantized: then there is nothing to calibrate or to bake.
    dynamic = False
    # Of a dynamic one whose s and z are `ops.affine_range` of the input: by sample (True) or over
    # the batch (False). Integer layers read such an input; None leaves a layer simulated.
    range_per_sample: bool | None = None
    # Whether post-training quantization without reconstruction fits it over t (MinMax + TDQ).
    fitted_over_time = False
    # Whether it holds what a quantizer computed from another interval.
    baked = False

    # The network's time step, of an interval that is baked.
    time: TimeContext | None = None
    # Which row of the bank is this quantizer's.
    row = 0

    @property
    def bank(self) -> Bank | None:
        """Return the parameters that this interval shares with others; None if all are its own."""
        return None

    def reading(self, bank: Bank, row: int) -> Interval:
        """Return an interval like this one that reads a row of a part of its bank."""
        raise NotImplementedError(_lacks(self, "reading"))

    def start(self, s: float) -> None:
        """Set the start value, for every time step alike. Nothing happens where s follows x."""
        if not self.dynamic:
            raise NotImplementedError(_lacks(self, "start"))

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


class Intervals:
    """What gives every activation quantizer of a network its interval."""

    # Whether the intervals are dynamic: such step sizes can't be reconstructed.
    dynamic = False
    # Whether each step size is one number, whatever t and the input.
    constant = False

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[Sequence[Interval], Bank | None]:
        """Return one interval for each name, and the bank that they share, if any.

        Args:
            names: of the quantizers.
            time: the network's time step.
            raw: hold s itself in place of rho, where a step size is one parameter (see `Static`).
        """
        raise NotImplementedError(_lacks(self, "make"))


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
