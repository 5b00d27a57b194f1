"""LSQ: the step size learns from the rounding error inside the range and from the bound outside.

    d x_hat / d s = round(v) - v   where n < v < p,   n or p outside;   all that reaches s times 1 / sqrt(N p)

Source: Esser et al., *Learned Step Size Quantization*, arXiv 1902.08153; with a learned offset as LSQ+, arXiv
2004.09576.
"""

from __future__ import annotations

from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.quantizer import Quantizer


class Lsq(Quantizer):
    """Arguments as `Quantizer`."""

    scales_gradient = True

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """x_hat with LSQ's gradients."""
        return ops.fake_quantize_learned(x, s, z, self.grid.n, self.grid.p)
