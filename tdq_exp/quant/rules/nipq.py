"""NIPQ: pseudo quantization noise in place of rounding, then a final phase with real rounding.

    x_hat = x + s u  where lo < x / s < hi,   s lo or s hi outside;   u in [-1/2, 1/2]

The noise has the width of a step, its bounds are s (n - z) and s (p - z), and the range is learned
through both. u is uniform, or drawn from the histogram of the tensor's own rounding error, as the
published code does.

Source: Shin et al., *NIPQ: Noise Proxy-Based Integrated Pseudo-Quantization*, CVPR 2023. The
length of its phases on diffusion is not published: `fit.real_rounding` is the last share of the
updates, 0.2 by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.quantizer import Quantizer

BINS = 256
QUANTILES = 16384


class Nipq(Quantizer):
    """NIPQ for activations. Arguments as `Quantizer`, and

    Args:
        histogram: draw the noise from the rounding error's histogram of 256 bins, not from the
            uniform law.
    """

    draws_noise = True  # from the global generator, while training

    def __init__(self, *args: object, histogram: bool = True, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.histogram = histogram
        self.noisy = True

    def set_final_phase(self, final: bool) -> None:
        """Round for real in the final phase, and add noise before it."""
        self.noisy = not final

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return x plus noise; in the final phase LSQ's rounding without its gradient scale."""
        n, p = self.grid.n, self.grid.p
        if not self.noisy:
            return ops.fake_quantize_learned(x, s, z, n, p)

        x = x.float()  # the noise is drawn in float32
        if self.histogram:
            noise = self._draw(x.detach(), s.detach(), self.zero if z is None else z.detach())
        else:
            noise = torch.rand_like(x) - 0.5
        return ops.add_quantization_noise(x, s, z, n, p, noise)

    def _draw(self, x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """Return u, of x's shape, drawn from the histogram of x's own rounding error."""
        # The histogram of what lies inside the range; histc leaves out what is beyond its ends.
        v = x / s
        outside = (v <= self.grid.n - z) | (v >= self.grid.p - z)
        error = (v.round() - v).masked_fill_(outside, 2.0)
        histogram = torch.histc(error, bins=BINS, min=-0.5, max=0.5)

        # Inverse transform sampling from a fine table of quantiles: one uniform draw and one
        # look-up per element. A bin that a level falls into is not empty, unless all are: then
        # nothing is inside, and no noise is used.
        shares = (histogram.cumsum(0) / histogram.sum().clamp(min=1)).double()
        levels = torch.arange(QUANTILES, device=x.device, dtype=torch.float64)
        levels = (levels + 0.5) / QUANTILES

        bins = torch.searchsorted(shares, levels).clamp_(max=BINS - 1)
        before = torch.cat([shares.new_zeros(1), shares])[bins]
        within = ((levels - before) / (shares[bins] - before).clamp(min=1e-9)).clamp(0, 1)
        table = ((bins + within) / BINS - 0.5).to(x.dtype)

        pick = torch.rand(x.shape, device=x.device).mul_(QUANTILES).int()
        return table.index_select(0, pick.reshape(-1)).reshape(x.shape)


class NipqWeights(Nipq):
    """NIPQ for weights: the range starts at max|w|."""

    start_by = "max"
