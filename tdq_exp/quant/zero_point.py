"""Zero points: the integer code of 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid


class ZeroPoint(nn.Module):
    """z = round(p zeta) clipped to n..p: one learned integer for all time steps.

    The parameter is a fraction of the grid, so that one learning rate moves it by the same share of the range at any
    number of bits.

    Args:
        grid: affine.
    """

    timed = False
    parameter_group = "zero_points"

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.zeta = nn.Parameter(torch.zeros(()))

    def start(self, s: float, z: int) -> None:
        """Sets the start value."""
        with torch.no_grad():
            self.zeta.fill_(z / self.grid.p)

    def forward(self, s: Tensor) -> Tensor:
        """z as float, 0-dim (or of s's shape), straight through to the parameter."""
        return ops.round_straight_through(self.zeta * self.grid.p, self.grid.n, self.grid.p)


class LowerBound(nn.Module):
    """z(t) = round(-beta / s(t)): a static real lower bound beta, for inputs whose minimum is fixed, like SiLU's.

    Args:
        grid: affine.
        beta: start value; found by calibration if not given.
        learned: False keeps beta where it is (the release: -0.2785).
    """

    def __init__(self, grid: Grid, beta: float | None = None, learned: bool = True) -> None:
        super().__init__()
        self.grid, self._fixed_start = grid, beta
        self.beta = nn.Parameter(torch.tensor(beta or 0.0), requires_grad=learned)

    timed = True
    parameter_group = "step_sizes"  # a real number in units of x, like s

    def start(self, s: float, z: int) -> None:
        """Sets the start value."""
        if self._fixed_start is None:
            with torch.no_grad():
                self.beta.fill_(-s * z)

    def forward(self, s: Tensor) -> Tensor:
        """z as float, of s's shape, straight through to beta and s."""
        return ops.round_straight_through(-self.beta / s, self.grid.n, self.grid.p)


class TableZeroPoint(nn.Module):
    """A baked zero point.

    Args:
        zero_points: `[T]` or `[1]`, integers held as float.
        time: the network's time step, if there are T of them.
    """

    def __init__(self, zero_points: Tensor, time: Any) -> None:
        super().__init__()
        self.time = time
        self.timed = len(zero_points) > 1
        self.zero_points: Tensor
        self.register_buffer("zero_points", zero_points.clone())

    def forward(self, s: Tensor) -> Tensor:
        """z at the current time step."""
        return ops.at(self.zero_points, self.time.t) if self.timed else self.zero_points[0]
