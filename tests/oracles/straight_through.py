"""The three methods' gradients in plain autograd: `detach` where the papers write a straight-through estimator.

Only away from the bounds themselves: there, autograd's `clamp` lets gradients pass that the papers cut.
"""

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """LSQ's `roundpass`: the value of round(x), the gradient of x."""
    return (x.round() - x).detach() + x


def lsq(x: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> Tensor:
    """LSQ's appendix, with LSQ+'s offset: scale, shift, clip, round, and back."""
    return (rounded((x / s + z).clamp(n, p)) - z) * s


def pact(x: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> Tensor:
    """Clip to real bounds with autograd; the quantization error of what is left is a constant."""
    alpha, beta = s * (p - z), s * (n - z)
    y = torch.where(x > alpha, alpha, torch.where(x < beta, beta, x))
    return y + (s * (y / s).round() - y).detach()


def nipq(x: Tensor, s: Tensor, z: Tensor, n: int, p: int, u: Tensor) -> Tensor:
    """Noise inside, bounds outside."""
    alpha, beta = s * (p - z), s * (n - z)
    return torch.where(x > alpha, alpha, torch.where(x < beta, beta, x + s * u))
