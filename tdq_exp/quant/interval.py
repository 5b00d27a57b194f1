"""Intervals: where a quantizer's step size comes from.

| interval   | s                                   | parameters |
|------------|-------------------------------------|------------|
| `Static`   | softplus(rho)                       | one |
| `PerStep`  | softplus(rho_g), g = floor(t G / T) | one for each of G groups of time steps |
| `Temporal` | softplus(f(enc(t)))                 | TDQ: a small network of t; see `generators` |
| `Dynamic`  | (max x - min x) / (p - n)           | none: read from the input |
| `MaxAbs`   | max|x| / p                          | none |
| `Table`    | s_t                                 | none: any of the above, baked |

All learned ones share one parametrisation, so that a comparison of two of them compares intervals: `Static` is
`Temporal` with zero weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.generators import GeneratorBank
from tdq_exp.quant.time import TimeContext


def inverse_softplus(s: float) -> float:
    """rho with softplus(rho) = s, for s > 0, without overflow: `s + ln(1 - e^-s)`."""
    return s + math.log(-math.expm1(-s))


def at(values: Tensor, t: Tensor) -> Tensor:
    """`values[t]` for t 0-dim or `[B]`; plain indexing with a 0-dim t would wait for an accelerator to say what t is."""
    return values.index_select(0, t.reshape(-1).to(values.device)).reshape(t.shape)


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


class Static(Interval):
    """One learned step size.

    Args:
        raw: hold s itself, as the release does, in place of rho.
    """

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.rho = nn.Parameter(torch.zeros(()))

    def start(self, s: float) -> None:
        with torch.no_grad():
            self.rho.fill_(s if self.raw else inverse_softplus(s))

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.rho.clamp(min=1e-8) if self.raw else F.softplus(self.rho)

    @torch.no_grad()
    def table(self) -> Tensor:
        return self().reshape(1)


class PerStep(Interval):
    """One learned step size for each group of neighbouring time steps.

    Args:
        groups: G, from 1 (static) to T (one for each time step).
        time: the network's time step.
    """

    timed = True

    def __init__(self, groups: int, time: TimeContext) -> None:
        super().__init__()
        if not 1 <= groups <= time.steps:
            raise ValueError(f"tdq.interval.groups={groups}: must be between 1 and the model's {time.steps} time steps")
        self.time = time
        self.rho = nn.Parameter(torch.zeros(groups))

    def _group(self, t: Tensor) -> Tensor:
        return torch.div(t.long() * len(self.rho), self.time.steps, rounding_mode="floor")

    def start(self, s: float) -> None:
        with torch.no_grad():
            self.rho.fill_(inverse_softplus(s))

    def forward(self, x: Tensor | None = None) -> Tensor:
        return at(F.softplus(self.rho), self._group(self.time.t))

    @torch.no_grad()
    def table(self) -> Tensor:
        return F.softplus(self.rho)[self._group(torch.arange(self.time.steps, device=self.rho.device))]


class Temporal(Interval):
    """TDQ: s~(t) = f(enc(t)); this quantizer's row of the network's bank of generators.

    Args:
        bank: all generators of the network.
        row: which one is this quantizer's.
    """

    timed = True

    def __init__(self, bank: GeneratorBank, row: int) -> None:
        super().__init__()
        self._bank = (bank,)  # in a tuple: the network's root owns the bank, not this module
        self.row = row

    @property
    def bank(self) -> GeneratorBank:
        return self._bank[0]

    def start(self, s: float) -> None:
        self.bank.start(self.row, inverse_softplus(s))

    def forward(self, x: Tensor | None = None) -> Tensor:
        if self.bank.training:
            return self.bank.step_sizes()[self.row]
        return self.bank.row_now(self.row)

    def table(self) -> Tensor:
        return self.bank.table()[self.row]


class Dynamic(Interval):
    """s and z from the minimum and the maximum of whatever is quantized, at run time: the opponent of the paper's Table 4.

    Args:
        per_sample: a range for each sample of a batch, or one for all, which makes an image depend on its companions.
    """

    dynamic = True

    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.per_sample = per_sample

    def start(self, s: float) -> None:
        """Nothing to set: s follows the input."""

    def affine(self, x: Tensor, n: int, p: int) -> tuple[Tensor, Tensor]:
        """(s, z) of an input, `[B]` or 0-dim, on codes n..p; without gradient."""
        x = x.detach()
        low, high = x.flatten(1).aminmax(dim=1) if self.per_sample else x.aminmax()
        return ops.affine_range(low, high, n, p)


class MaxAbs(Interval):
    """s = max|x| / p of whatever is quantized, as a constant: PACT's weights.

    Args:
        p: largest code of a symmetric grid.
    """

    def __init__(self, p: int) -> None:
        super().__init__()
        self.p = p

    def start(self, s: float) -> None:
        """Nothing to set: s follows the tensor."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        assert x is not None
        return x.detach().abs().amax().clamp(min=1e-12) / self.p


class Table(Interval):
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


class StaticIntervals:
    """Gives every activation quantizer one step size for all time steps.

    Args:
        raw: see `Static`.
    """

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [Static(raw) for _ in names], None


class PerStepIntervals:
    """Gives every activation quantizer G step sizes: the paper's Table 3.

    Args:
        groups: G; S1 is one static interval, S1000 one for each time step.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [PerStep(self.groups, time) for _ in names], None


class DynamicIntervals:
    """Lets every activation quantizer read its range from its input.

    Args:
        per_sample: see `Dynamic`.
    """

    def __init__(self, per_sample: bool) -> None:
        self.per_sample = per_sample

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [Dynamic(self.per_sample) for _ in names], None


class TemporalIntervals:
    """Gives every activation quantizer a generator of its own: TDQ.

    Args:
        encoding: d, width of enc(t).
        width: of the hidden layers of f.
        layers: linear layers of f; the paper finds quality stable from 4 on.
        dropout: before the last layer, while training (release: 0.2).
        he: He initialisation of the last layer (the paper), or torch's default everywhere (release).
    """

    def __init__(self, encoding: int, width: int = 64, layers: int = 4, dropout: float = 0.0, he: bool = True) -> None:
        self.options = {"encoding": encoding, "width": width, "layers": layers, "dropout": dropout, "he": he}

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], GeneratorBank]:
        """One interval for each name, and the bank that they read."""
        bank = GeneratorBank(names, time, **self.options)  # type: ignore[arg-type]
        return [Temporal(bank, row) for row in range(len(names))], bank
