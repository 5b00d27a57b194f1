"""MinMax: the range is the minimum and the maximum, of a weight's channel or of a calibration set.

    s = (max - min) / (p - n),   z = round(n - min / s),   min <= 0 <= max

The range is widened to hold 0, so that z lies on the grid and a padded zero is exact. Weights
follow their own range, one for each output channel (`intervals.dynamic.ChannelRange`), as PTQ4DM
and BRECQ do by default.

Source: Jacob et al., *Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference*, arXiv 1712.05877, section 3.
"""

from __future__ import annotations

from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.lsq import Lsq


class MinMax(Lsq):
    """Activations start at the range of the calibration set.

    Where s depends on t they start at least squared error.
    """

    @property
    def start_by(self) -> str:  # type: ignore[override]
        """What calibration takes as the start of s and z."""
        return "error" if self.interval.time_dependent else "range"


class MinMaxWeights(Quantizer):
    """Weights by output channel. This rule does not train them: gradients pass straight through."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return w_hat, whose gradient goes to w as it is."""
        w_hat = ops.fake_quantize(x.detach(), s, z, self.grid.n, self.grid.p)
        return ops.pass_straight_through(x, w_hat)

    def differentiable(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return the same in eval."""
        return self.rule(x, s, z)
