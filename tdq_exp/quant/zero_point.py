"""Zero points: the integer code of 0.

| zero point       | z                   | parameters |
|------------------|---------------------|------------|
| none             | 0: symmetric grids  | |
| `ZeroPoint`      | round(p zeta)       | zeta: a learned integer for all t |
| `LowerBound`     | round(-beta / s(t)) | beta: a learned lower bound of x |
| `TableZeroPoint` | z_t                 | none: any of the above, baked |

A source has one contract: `zero_point(s)` returns z. Where the range of the input gives s, as in
`intervals.dynamic`, it gives z as well, and this slot stays empty.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.time import TimeContext


class ZeroPointSource(nn.Module):
    """A source of zero points."""

    # Whether z depends on t, by itself or through s.
    time_dependent = False
    # Whether it stands for a smallest value of x that is fixed, like SiLU's.
    bounded_below = False
    # For the layer map.
    description = ""

    def start(self, s: float, z: int) -> None:
        """Set the start value that calibration found."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, s: Tensor) -> Tensor:
        """Return z at the current time step, an integer held as float: 0-dim, or of s's shape."""
        raise NotImplementedError(type(self).__name__)

    @torch.no_grad()
    def table(self, s: Tensor) -> Tensor:
        """Return z for every time step, `[T]`, or `[1]` if it does not depend on t.

        Args:
            s: the table of step sizes, `[T]` or `[1]`.
        """
        return self(s if self.time_dependent else s[:1]).reshape(-1)


class ZeroPoint(ZeroPointSource):
    """z = round(p zeta) clipped to n..p: one learned integer for all time steps.

    The parameter is a fraction of the grid, so that one learning rate moves it by the same share of
    the range at any number of bits.

    Args:
        grid: affine.
    """

    parameter_group = "zero_points"
    description = "learned z"

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.zeta = nn.Parameter(torch.zeros(()))

    def start(self, s: float, z: int) -> None:
        """Set zeta = z / p."""
        with torch.no_grad():
            self.zeta.fill_(z / self.grid.p)

    def forward(self, s: Tensor) -> Tensor:
        """Return z, 0-dim; gradients pass straight through to zeta."""
        return ops.round_straight_through(self.zeta * self.grid.p, self.grid.n, self.grid.p)


class LowerBound(ZeroPointSource):
    """z(t) = round(-beta / s(t)): a static real lower bound beta.

    For inputs whose minimum is fixed, like SiLU's.

    Args:
        grid: affine.
        beta: start value; found by calibration if not given.
        learned: False keeps beta where it is (the release: -0.2785).
    """

    time_dependent = True
    bounded_below = True
    parameter_group = "step_sizes"  # a real number in units of x, like s
    description = "z(t) from a lower bound"

    def __init__(self, grid: Grid, beta: float | None = None, learned: bool = True) -> None:
        super().__init__()
        self.grid, self._fixed_start = grid, beta
        self.beta = nn.Parameter(torch.tensor(beta or 0.0), requires_grad=learned)

    def start(self, s: float, z: int) -> None:
        """Set beta = -s z, unless it was given."""
        if self._fixed_start is None:
            with torch.no_grad():
                self.beta.fill_(-s * z)

    def forward(self, s: Tensor) -> Tensor:
        """Return z, of s's shape; gradients pass straight through to beta and s."""
        return ops.round_straight_through(-self.beta / s, self.grid.n, self.grid.p)


class TableZeroPoint(ZeroPointSource):
    """A baked zero point.

    Args:
        zero_points: `[T]` or `[1]`, integers held as float.
        time: the network's time step, if there are T of them.
    """

    description = "z table"

    def __init__(self, zero_points: Tensor, time: TimeContext | None) -> None:
        super().__init__()
        self.time = time
        self.time_dependent = len(zero_points) > 1
        self.zero_points: Tensor
        self.register_buffer("zero_points", zero_points.clone())

    def forward(self, s: Tensor) -> Tensor:
        """Return z at the current time step."""
        if not self.time_dependent:
            return self.zero_points[0]
        assert self.time is not None
        return ops.at(self.zero_points, self.time.t)

    def table(self, s: Tensor) -> Tensor:
        """Return the table."""
        return self.zero_points
