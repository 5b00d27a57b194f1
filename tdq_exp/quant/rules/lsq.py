"""LSQ: the step size learns from the rounding error inside the range and from the bound outside.

    d x_hat / d s = round(v) - v   where n < v < p,   n or p outside

and all that reaches s is multiplied by 1 / sqrt(N p).

Source: Esser et al., *Learned Step Size Quantization*, arXiv 1902.08153; with a learned offset
as LSQ+, arXiv 2004.09576.
"""

from __future__ import annotations

from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.quantizer import Quantizer


class Lsq(Quantizer):
    """LSQ for weights and activations. Arguments as `Quantizer`."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return x_hat with LSQ's gradients."""
        return ops.fake_quantize_learned(x, s, z, self.grid.n, self.grid.p)

    def gradient_factor(self, x: Tensor) -> float:
        """Return `1 / sqrt(N p)`, or 1 if the gradient scale is off.

        N counts the elements that one s is for: of the whole weight, of one sample of an
        activation.
        """
        if not self.gradient_scale:
            return 1.0
        elements = x.numel() if self.fixed else x[0].numel()
        return float((elements * self.grid.p) ** -0.5)
