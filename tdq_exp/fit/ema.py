"""Exponential moving average of a network's parameters.

    theta_ema <- d theta_ema + (1 - d) theta

The average is a whole copy of the network, with a time context of its own, so it can be evaluated
and sampled while the other one trains.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Args:
    net: the network to follow; copied as it is now. Its parameters and buffers may change, but stay
        the same tensors.
    decay: d. Early on it is min(d, (1 + updates) / (10 + updates)), so that the start is forgotten.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"fit.ema_decay={decay}: must be in [0, 1)")
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

        # Looked up once: to walk through a thousand modules takes longer than the sums.
        self._averages: list[Tensor] = list(self.net.parameters())
        self._values: list[Tensor] = list(net.parameters())
        self._copies: list[Tensor] = list(self.net.buffers())
        self._buffers: list[Tensor] = list(net.buffers())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the parameters after the given number of updates; buffers are copied."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)  # one launch for hundreds of scalars
