"""Exponential moving average of a network's parameters.

    theta_ema <- d theta_ema + (1 - d) theta

The average is a whole copy of the network, with a time context of its own, so it can be evaluated
and sampled while the other one trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

PIECE = 1 << 24  # elements whose differences are held at once: 64 MB


class Ema:
    """A network whose parameters are a moving average of another network's.

    Args:
        net: the network to follow; copied as it is now. Its parameters and buffers may change, but
            stay the same tensors.
        decay: d. Early on it is min(d, (1 + updates) / (10 + updates)), so that the start is
            forgotten.
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

        self._pieces = list(_pieces(self._averages, self._values))

    def weight(self, updates: int) -> float:
        """Return 1 - d after the given number of updates."""
        return 1 - min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after the given number of updates; buffers are copied."""
        torch._foreach_lerp_(self._averages, self._values, self.weight(updates))
        self._copy_buffers()

    @torch.no_grad()
    def blend(self, weight: Tensor) -> None:
        """Take in the parameters with a weight that lies on the device; buffers are copied.

            theta_ema <- theta_ema + w (theta - theta_ema)

        Args:
            weight: w, 0-dim. It is read when the work runs, so that a recording follows it.
        """
        for averages, values in self._pieces:
            change = torch._foreach_sub(values, averages)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(averages, change)
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)  # one launch for hundreds of scalars


def _pieces(
    averages: Sequence[Tensor], values: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield (averages, values) in their order, a piece of the parameters at a time."""
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    for average, value in zip(averages, values, strict=True):
        if mine and sum(tensor.numel() for tensor in mine) + average.numel() > PIECE:
            yield mine, theirs
            mine, theirs = [], []
        mine.append(average)
        theirs.append(value)
    if mine:
        yield mine, theirs
