"""Step sizes that are parameters: one for all time steps, or one for each group of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.config.setting import require
from tdq_exp.quant.intervals.base import Interval, Intervals, inverse_softplus
from tdq_exp.quant.ops import at
from tdq_exp.quant.time import TimeContext


class Static(Interval):
    """One learned step size, s = softplus(rho).

    Args:
        raw: hold s itself in place of rho, as the release does.
    """

    parameter_group = "step_sizes"

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.rho = nn.Parameter(torch.zeros(()))

    def start(self, s: float) -> None:
        """Set rho so that the step size is s."""
        with torch.no_grad():
            self.rho.fill_(s if self.raw else inverse_softplus(s))

    def step_size(self) -> Tensor:
        """Return s, 0-dim."""
        return self.rho.clamp(min=1e-8) if self.raw else F.softplus(self.rho)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return s, `[1]`."""
        return self.step_size().reshape(1)


class PerStep(Interval):
    """One learned step size for each group of neighbouring time steps.

        s(t) = softplus(rho_g),   g = floor(t G / T)

    Args:
        groups: G, from 1 (static) to T (one for each time step).
        time: the network's time step.
    """

    time: TimeContext
    time_dependent = True
    fitted_over_time = True
    parameter_group = "step_sizes"

    def __init__(self, groups: int, time: TimeContext) -> None:
        super().__init__()
        if not 1 <= groups <= time.steps:
            raise ValueError(
                f"tdq.interval.groups={groups}: must be between 1 and the model's {time.steps}"
                " time steps"
            )
        self.time = time
        self.rho = nn.Parameter(torch.zeros(groups))

    def _group(self, t: Tensor) -> Tensor:
        return torch.div(t.long() * len(self.rho), self.time.steps, rounding_mode="floor")

    def start(self, s: float) -> None:
        """Set the step size of every group to s."""
        with torch.no_grad():
            self.rho.fill_(inverse_softplus(s))

    def step_size(self) -> Tensor:
        """Return s at the current time step, 0-dim or `[B]`."""
        return at(F.softplus(self.rho), self._group(self.time.t))

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return s for every time step, `[T]`."""
        t = torch.arange(self.time.steps, device=self.rho.device)
        return F.softplus(self.rho)[self._group(t)]


class StaticIntervals(Intervals):
    """Give every activation quantizer one step size for all time steps."""

    constant = True

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[list[Interval], None]:
        """Return one interval for each name; no bank. `raw`: see `Static`."""
        return [Static(raw) for _ in names], None


class PerStepIntervals(Intervals):
    """Give every activation quantizer G step sizes: the paper's Table 3.

    Args:
        groups: G; 1 is one static interval, T one step size for each time step.
    """

    def __init__(self, groups: int) -> None:
        require("tdq.interval.groups", groups, int, low=1)
        self.groups = groups

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[list[Interval], None]:
        """Return one interval for each name; no bank."""
        return [PerStep(self.groups, time) for _ in names], None
