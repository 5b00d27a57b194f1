"""PACT: the clipping value alpha(t) = s(t) (p - z) learns from clipped elements only.

    d x_hat / d alpha = 1 where x > alpha, 0 inside;   loss += decay alpha^2

For signed inputs both bounds follow from s, and the penalty is on half of the range, alpha = s (p -
n) / 2. It takes the mean over the batch where s depends on t.

Source: Choi et al., *PACT*, arXiv 1805.06085. Its weights are DoReFa's (arXiv 1606.06160), which
rescale any weight to [-1, 1] and so need a normalisation behind them that a pre-trained diffusion
U-Net does not have. Ours are symmetric with s = max|w| / p; the literal form is `DorefaWeights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdq_exp.config.setting import require
from tdq_exp.quant import ops
from tdq_exp.quant.quantizer import Quantizer


class Pact(Quantizer):
    """PACT for activations. Arguments as `Quantizer`, and

    Args:
        decay: weight of the L2 penalty on alpha.
    """

    def __init__(self, *args: object, decay: float = 2e-4, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        require("act.quantizer.decay", decay, float, low=0, most=1e6)
        self.decay = decay

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return x_hat with PACT's gradients."""
        return ops.fake_quantize_clipped(x, s, z, self.grid.n, self.grid.p)

    def penalty(self) -> Tensor | None:
        """Return `decay mean(alpha^2)` at the current time steps.

        None without decay, or where s follows the input: nothing is clipped then, and alpha is
        not learned.
        """
        s = self.interval.step_size()
        if s is None or not self.decay:
            return None
        alpha = self.transform_step(s) * ((self.grid.p - self.grid.n) / 2)
        return self.decay * alpha.square().mean()


class PactWeights(Quantizer):
    """Symmetric weights whose step follows from their largest magnitude.

    Gradients pass straight through.
    """

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return w_hat.

        Where s follows the maximum nothing is clipped, not even the largest weight, which lies on
        the bound.
        """
        n, p = self.grid.n, self.grid.p
        if s.requires_grad:
            return ops.fake_quantize_clipped(x, s, z, n, p)
        return ops.pass_straight_through(x, ops.fake_quantize(x.detach(), s, z, n, p))


class DorefaWeights(Quantizer):
    """DoReFa's literal form: `2 q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1` on 2^b - 1 levels.

    It rescales the weights, is outside of the grid laws, and has no integer execution.
    """

    integer = False

    def forward(self, w: Tensor) -> Tensor:
        """Return w_hat in [-1, 1], while training and in eval."""
        if self.observer is not None:
            self.observer(w)
            return w
        bounded = torch.tanh(w)
        unit = bounded / (2 * bounded.abs().amax().detach()) + 0.5
        levels = 2**self.grid.bits - 1
        return 2 * ops.round_straight_through(unit * levels) / levels - 1
