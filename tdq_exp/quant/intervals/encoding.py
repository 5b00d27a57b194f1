"""What TDQ's networks read of the time step: its Fourier encoding, or the bare number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

T_MAX = 10000.0


def encode_time(t: Tensor, width: int) -> Tensor:
    """Return the geometric Fourier encoding of the raw integer time step.

    Args:
        t: `[B]`, integer.
        width: d, even.

    Returns:
        `[B, d]`, float32: cos of the d/2 frequencies, then sin.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64) * (-math.log(T_MAX) / half)
    angle = t.double()[:, None] * torch.exp(exponents).to(t.device)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def scaled_time(steps: int) -> Tensor:
    """Return t / T of every time step, `[T, 1]`: the input without an encoding."""
    return torch.arange(steps, dtype=torch.float32)[:, None] / steps
