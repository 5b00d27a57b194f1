"""MinMax: the range is the minimum and the maximum, of a weight's output channel or of everything that calibration saw.

    s = (max - min) / (p - n),   z = round(n - min / s),   min <= 0 <= max

The range is widened to hold 0, so that z lies on the grid and a padded zero is exact. Weights follow their own range, one
for each output channel, as PTQ4DM and BRECQ do by default.

Source: Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
arXiv 1712.05877, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.lsq import Lsq


class MinMax(Lsq):
    """Activations: the range of the calibration set. Where s depends on t, each quantizer's error is what it starts by."""

    @property
    def start_by(self) -> str:  # type: ignore[override]
        return "error" if self.interval.timed else "range"


class ChannelRange(Interval):
    """s of each output channel of a weight, from its range; no parameters.

    Args:
        grid: affine.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def start(self, s: float) -> None:
        """Nothing to set: s follows the tensor."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        """`[out]`."""
        assert x is not None
        return ops.affine_range(*x.detach().flatten(1).aminmax(dim=1), self.grid.n, self.grid.p)[0]


class MinMaxWeights(Quantizer):
    """Weights by output channel, affine. They are not trained by this rule: gradients pass straight through."""

    start_by = "tensor"

    def parameters_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(s, z), `[out, 1, ...]` each."""
        s, z = ops.affine_range(*x.detach().flatten(1).aminmax(dim=1), self.grid.n, self.grid.p)
        shape = (-1, *[1] * (x.dim() - 1))
        return s.reshape(shape), z.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """w_hat, float32."""
        if self.observer is not None:
            self.observer(x)
            return x
        s, z = self.parameters_at(x.float())
        return ops.pass_straight_through(x, ops.fake_quantize(x.detach().float(), s, z, self.grid.n, self.grid.p))

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """As `forward`."""
        return self(x)


@torch.no_grad()
def range_start(low: float, high: float, grid: Grid) -> tuple[float, int]:
    """(s, z) of a range, as numbers."""
    s, z = ops.affine_range(torch.tensor(low), torch.tensor(high), grid.n, grid.p)
    return float(s), int(z)
