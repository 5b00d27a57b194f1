"""Step sizes that training learns directly: one for all time steps, or one for each group of them (Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant.intervals.base import Interval, inverse_softplus
from tdq_exp.quant.ops import at
from tdq_exp.quant.time import TimeContext


class Static(Interval):
    """One learned step size.

    Args:
        raw: hold s itself, as the release does, in place of rho.
    """

    parameter_group = "step_sizes"

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
    parameter_group = "step_sizes"

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


class StaticIntervals:
    """Gives every activation quantizer one step size for all time steps.

    Args:
        raw: see `Static`.
    """

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [Static(raw) for _ in names], None


class PerStepIntervals:
    """Gives every activation quantizer G step sizes: the paper's LookupTable 3.

    Args:
        groups: G; S1 is one static interval, S1000 one for each time step.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [PerStep(self.groups, time) for _ in names], None
