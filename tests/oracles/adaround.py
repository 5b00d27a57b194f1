"""AdaRound (arXiv 2004.10568, eq. (21)-(24)) one number at a time, and once more as plain autograd in double precision.

w_hat = s (clip(floor(w / s) + h(V) + z, n, p) - z),   h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
term  = sum 1 - |2 h(V) - 1|^beta
"""

import math

import torch
from torch import Tensor

from tests.oracles.rounding import clip

ZETA, GAMMA = 1.1, -0.1


def h(v: float) -> float:
    """The rectified sigmoid."""
    return clip(1 / (1 + math.exp(-v)) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def soft_weight(w: float, s: float, z: int, n: int, p: int, v: float) -> float:
    """w_hat while V is being trained."""
    return s * (clip(math.floor(w / s) + h(v) + z, n, p) - z)


def hard_code(w: float, s: float, z: int, n: int, p: int, v: float) -> int:
    """The code that is kept: up where h is at least a half."""
    return int(clip(math.floor(w / s) + (1 if h(v) >= 0.5 else 0) + z, n, p))


def term(values: list[float], beta: float) -> float:
    """The rounding term of some V."""
    return sum(1 - abs(2 * h(v) - 1) ** beta for v in values)


def beta(update: int, updates: int, start: float, end: float, warmup: float) -> float | None:
    """Half a cosine from `start` to `end` over the updates that follow the warm-up, in which there is no term."""
    first = warmup * updates
    if update < first:
        return None
    share = (update - first) / (updates - first)
    return end + 0.5 * (start - end) * (1 + math.cos(share * math.pi))


def soft_weights(w: Tensor, s: Tensor, z: Tensor, n: int, p: int, v: Tensor) -> Tensor:
    """`soft_weight` of a tensor, with a graph to V."""
    up = torch.minimum(torch.maximum(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0 * v), 0 * v + 1)
    lifted = torch.floor(w / s) + up + z
    return s * (torch.where(lifted < n, n + 0 * v, torch.where(lifted > p, p + 0 * v, lifted)) - z)


def terms(v: Tensor, beta: float) -> Tensor:
    """`term` of a tensor, with a graph to V."""
    up = torch.minimum(torch.maximum(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0 * v), 0 * v + 1)
    return torch.sum(1 - torch.abs(2 * up - 1) ** beta)
