"""Fake quantization as single tensor operations: what is computed where no fused kernel applies."""

from __future__ import annotations

import torch
from torch import Tensor

# Kinds of gradients of s, by the numbers that the fused kernels know them by.
KINDS = {"learned": 0, "clipped": 1, "noise": 2}


def forward(
    x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (v, x_hat) with v = x / s, which `backward` reads. Arguments as in `ops`."""
    v = x / s
    if z is None:
        x_hat = v.clamp(n, p)
    else:
        x_hat = torch.maximum(v, n - z)
        torch.minimum(x_hat, p - z, out=x_hat)

    if noise is None:
        x_hat.round_()
    else:
        low, high = (n, p) if z is None else (n - z, p - z)
        x_hat.addcmul_(noise, ((v > low) & (v < high)).to(noise.dtype))
    if torch.compiler.is_compiling():
        return v, x_hat * s  # after an operation in place, torch 2.11 loses the gradient here
    return v, x_hat.mul_(s)


def gradient_of_input(g: Tensor, v: Tensor, z: Tensor | None, n: int, p: int) -> Tensor:
    """Return g where n < v + z < p, else 0, in one pass."""
    u = v if z is None else v + z
    return torch.ops.aten.hardtanh_backward(g, u, n, p)


def gradient_of_step_size(
    g: Tensor, g_x: Tensor, v: Tensor, x_hat: Tensor, s: Tensor, scale: float, clipped: bool
) -> Tensor:
    """Return the gradient of s, of its shape: PACT's where `clipped`, else LSQ's."""
    if clipped:
        g_s = _sum_like((g - g_x), x_hat, s) / s
    else:
        g_s = _sum_like(g, x_hat, s) / s - _sum_like(g_x, v, s)
    return g_s * scale


def gradient_of_zero_point(g: Tensor, g_x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """Return the gradient of z, of its shape."""
    if s.numel() > 1 or z.numel() > 1:
        outside = (g_x - g).flatten(1).sum(1).reshape(-1, *[1] * (g.dim() - 1))
    else:
        outside = (g_x - g).sum()

    g_z = outside * s
    return g_z.reshape(z.shape) if z.numel() == g_z.numel() else g_z.sum().reshape(z.shape)


def _sum_like(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Return sum(a b) over all axes along which s is constant; s is a scalar or `[B, 1, ...]`."""
    if s.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(s.shape)
    return (a * b).flatten(1).sum(1).reshape(s.shape)
