"""AdaRound: each weight is rounded up or down, whichever suits the output of its block.

    w_hat = s (clip(floor(w / s) + h(V) + z, n, p) - z)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    L = reconstruction + lambda sum (1 - |2 h(V) - 1|^beta),   zeta = 1.1, gamma = -0.1

h starts at the fraction of w / s, so that w_hat = w; beta falls over the updates and drives h to 0
or 1, along a cosine. BRECQ's published code lets it fall linearly: `fit.beta_schedule=linear`.

Source: Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*,
arXiv 2004.10568, eq. (21)-(24).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ZETA, GAMMA = 1.1, -0.1


class AdaRound(nn.Module):
    """Takes a weight quantizer's place while its block is reconstructed.

    Args:
        weight: w, `[out, ...]`, float.
        s: step size, broadcastable to w.
        z: zero point, an integer held as float, broadcastable to w.
        n, p: smallest and largest code.
    """

    def __init__(self, weight: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> None:
        super().__init__()
        self.s, self.z, self.n, self.p = s, z, n, p
        v = weight / s
        self.floor = v.floor()
        share = ((v - self.floor - GAMMA) / (ZETA - GAMMA)).clamp(1e-6, 1 - 1e-6)
        self.V = nn.Parameter(torch.log(share / (1 - share)))

    def rounding(self) -> Tensor:
        """Return h(V), in [0, 1]."""
        return (torch.sigmoid(self.V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return w_hat with soft rounding; the argument is not used."""
        codes = (self.floor + self.rounding() + self.z).clamp(self.n, self.p)
        return (codes - self.z) * self.s

    def regularizer(self, beta: float) -> Tensor:
        """Return `sum (1 - |2 h(V) - 1|^beta)`, scalar."""
        return (1 - (2 * self.rounding() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes n..p, with every h rounded to the side of 1/2 where it lies."""
        return (self.floor + (self.rounding() >= 0.5) + self.z).clamp(self.n, self.p)


def beta_at(
    update: int, updates: int, start: float, end: float, warmup: float, schedule: str = "cosine"
) -> float | None:
    """Return beta of an update, or None while the term is off.

        end + (start - end) (1 + cos(pi r)) / 2      cosine
        end + (start - end) (1 - r)                  linear, as BRECQ's published code has it
        r = (u - warmup updates) / (updates - warmup updates)

    Args:
        update: u, from 0.
        updates: how many there are.
        start, end: of beta.
        warmup: share of the updates before the term acts.
        schedule: `cosine` or `linear`.
    """
    first = warmup * updates
    if update < first:
        return None

    if schedule == "linear":
        return end + (start - end) * (1 - (update - first) / (updates - first))
    return end + (start - end) * (1 + math.cos(math.pi * (update - first) / (updates - first))) / 2
