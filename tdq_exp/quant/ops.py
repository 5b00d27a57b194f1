"""Fake quantization and its gradients. Pure functions of tensors; every rule's arithmetic is here.

    x_bar = clip(round(x / s) + z, n, p)          the integer code
    x_hat = s (x_bar - z)                         what the layer sees

With v = x / s and bounds lo = n - z, hi = p - z (integers), x_hat = s round(clip(v, lo, hi)).
Written as four in-place passes, this takes a fifth of the time of torch's fused fake-quantize
kernels on a CPU, which are not vectorised, and it divides, as the definition and ONNX's
QuantizeLinear do, where torch's kernels multiply by a rounded 1 / s.

Gradients, with m = [lo < v < hi] (strict, as in LSQ, arXiv 1902.08153, eq. 3):

    d x_hat / d x = m                                       all rules: straight through inside
    d x_hat / d s = m (x_hat / s - v) + (1 - m) x_hat / s   learned: rounding error, or bound
    d x_hat / d s =                     (1 - m) x_hat / s   clipped: PACT, alpha = s (p - z)
    d x_hat / d z = -(1 - m) s

The first of the two holds for NIPQ's pseudo quantization noise as well, where x_hat = x + s u
inside.

Where `kernels` apply, each direction is one fused kernel; x_hat is the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdq_exp.quant import kernels
from tdq_exp.quant.kernels import plain


class _RoundToGrid(torch.autograd.Function):
    # Not x + (round(x) - x): that is an integer only up to the last bit, and zero points must be
    # whole.
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: float, p: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.codes = n, p
        return x.round().clamp(n, p)  # in place, torch.compile of torch 2.11 loses the gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (n, p), (g,) = ctx.saved_tensors, ctx.codes, gradients
        if kernels.fused_on_gpu(x):
            return kernels.kernels_for(x).round_backward(x, g, n, p), None, None
        # Where a descent step would move further away from the grid.
        outwards = ((x < n) & (g > 0)) | ((x > p) & (g < 0))
        return torch.where(outwards, 0.0, g), None, None


def round_straight_through(x: Tensor, n: float = -torch.inf, p: float = torch.inf) -> Tensor:
    """Return round(x) clipped to n..p, with the gradient of x.

    Beyond the ends only a gradient that leads back passes: without it, a parameter that one
    update has carried past an end would stay there for ever.
    """
    return _RoundToGrid.apply(x, n, p)


class _PassStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        return x_hat.view_as(x_hat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _MultiplyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return s.view_as(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def multiply_gradient(s: Tensor, factor: float) -> Tensor:
    """Return s, whose gradient is multiplied by a constant on its way back."""
    return s if factor == 1.0 else _MultiplyGradient.apply(s, factor)


def pass_straight_through(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return x_hat, with all of its gradient going to x."""
    return _PassStraightThrough.apply(x, x_hat)


def to_codes(x: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> Tensor:
    """Return the codes `clip(round(x / s) + z, n, p)` as floats.

    Args:
        x: any shape.
        s: step size, broadcastable to x.
        z: zero point, an integer held as float, broadcastable to x.
        n: smallest code.
        p: largest code.
    """
    return (x / s).round_().add_(z).clamp_(n, p)


def fake_quantize(x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int) -> Tensor:
    """Return x_hat, without gradient: what inference computes.

    Arguments as in `to_codes`; z = None is 0, in fewer passes.
    """
    if kernels.fused(x, s, z):
        dtype = kernels.result_type(x)
        if kernels.traced(x):
            return kernels.traced_fake_quantize(x, s, z, (n, p), 1.0, "learned", None, dtype)
        return kernels.kernels_for(x).forward(kernels.dense(x), s, z, n, p, None, dtype)
    x = x.float() if x.dtype == torch.bfloat16 else x
    v = x / s
    if z is None:
        v.clamp_(n, p)
    else:
        torch.maximum(v, n - z, out=v)
        torch.minimum(v, p - z, out=v)
    return v.round_().mul_(s)


def fake_quantize_at(x: Tensor, s: Tensor, t: Tensor, z: Tensor | None, n: int, p: int) -> Tensor:
    """Return x_hat, without gradient, with s and z read from tables at one time step.

    On a GPU the kernel reads them, so that a time-dependent step size costs no launch more than a
    static one.

    Args:
        x: any shape.
        s: step sizes, `[T]`.
        t: 0-dim, integer.
        z: zero points, `[T]` or `[1]`; None is 0.
        n: smallest code.
        p: largest code.
    """
    if x.is_cuda and t.device == x.device and kernels.fused(x) and not kernels.traced(x):
        found = kernels.kernels_for(x)
        return found.forward_at(kernels.dense(x), s, z, t, n, p, kernels.result_type(x))
    step = at(s, t)
    if z is None:
        return fake_quantize(x, step, None, n, p)
    return fake_quantize(x, step, at(z, t) if len(z) > 1 else z[0], n, p)


def at(values: Tensor, t: Tensor) -> Tensor:
    """Return `values[t]` for t 0-dim or `[B]`.

    Plain indexing with a 0-dim t would wait for an accelerator to say what t is.
    """
    return values.index_select(0, t.reshape(-1).to(values.device)).reshape(t.shape)


class _FusedFakeQuantize(torch.autograd.Function):
    """Fake quantization by fused kernels.

    `kind` is learned, clipped or noise; `noise` is u of the last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        z: Tensor | None,
        n: int,
        p: int,
        scale: float,
        kind: str,
        noise: Tensor | None,
    ) -> Tensor:
        x = kernels.dense(x)
        noise = None if noise is None else kernels.like(x, noise)
        ctx.save_for_backward(x, s, z, noise)
        ctx.numbers = n, p, scale, kind
        return kernels.kernels_for(x).forward(x, s, z, n, p, noise, kernels.result_type(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, s, z, noise = ctx.saved_tensors
        n, p, scale, kind = ctx.numbers
        g = kernels.like(x, gradients[0])
        found = kernels.kernels_for(x).backward(g, x, s, z, n, p, scale, kind, noise)
        wanted = (g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None, None


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization by single tensor operations, with the gradients above.

    `noise` replaces rounding by x + s u; `clipped` selects PACT's gradient of s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        z: Tensor | None,
        n: int,
        p: int,
        scale: float,
        clipped: bool,
        noise: Tensor | None,
    ) -> Tensor:
        v, x_hat = plain.forward(x, s, z, n, p, noise)
        ctx.save_for_backward(v, x_hat, s, z)
        ctx.codes, ctx.scale, ctx.clipped = (n, p), scale, clipped
        return x_hat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, x_hat, s, z = ctx.saved_tensors
        g = gradients[0].contiguous()
        g_x = plain.gradient_of_input(g, v, z, *ctx.codes)
        g_s = g_z = None
        if ctx.needs_input_grad[1]:
            g_s = plain.gradient_of_step_size(g, g_x, v, x_hat, s, ctx.scale, ctx.clipped)
        if ctx.needs_input_grad[2]:
            g_z = plain.gradient_of_zero_point(g, g_x, s, z)
        return g_x if ctx.needs_input_grad[0] else None, g_s, g_z, None, None, None, None, None


def _fake_quantize(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None = None,
) -> Tensor:
    """Return x_hat, by the first of three ways that applies.

    1. No fused kernel is for such tensors, or kernels are off: single tensor operations.
    2. Somebody records operations or replaces memory: a torch operator that stands for the kernel.
    3. Plain tensors: the kernel itself.
    """
    if not kernels.fused(x, s, z):
        x = x.float() if x.dtype == torch.bfloat16 else x
        return _FakeQuantize.apply(x, s, z, n, p, scale, kind == "clipped", noise)
    if kernels.traced(x):
        dtype = kernels.result_type(x)
        return kernels.traced_fake_quantize(x, s, z, (n, p), scale, kind, noise, dtype)
    return _FusedFakeQuantize.apply(x, s, z, n, p, scale, kind, noise)


def affine_range(low: Tensor, high: Tensor, n: int, p: int) -> tuple[Tensor, Tensor]:
    """Return (s, z) of the ranges [low, high], of their shape.

    The ranges are widened to hold 0, and on a symmetric grid to both sides.

        s = (high - low) / (p - n),   z = round(n - low / s),   low <= 0 <= high

    Args:
        low, high: smallest and largest value of what is quantized.
        n, p: smallest and largest code.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if n < 0:
        high = torch.maximum(high, -low)
        low = -high
    s = ((high - low) / (p - n)).clamp(min=1e-10)
    return s, (n - low / s).round().clamp(n, p)


def fake_quantize_learned(
    x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int, scale: float = 1.0
) -> Tensor:
    """Return x_hat with LSQ's gradients.

    Args:
        x: any shape.
        s: step size, a scalar or `[B, 1, ...]`.
        z: zero point, scalar or of s's shape, an integer held as float; None is 0, in fewer passes.
        n: smallest code.
        p: largest code.
        scale: multiplies the gradient of s (LSQ's `1 / sqrt(N p)`).

    References:
        Esser et al., *Learned Step Size Quantization*, arXiv 1902.08153, eq. (1)-(5).
    """
    return _fake_quantize(x, s, z, n, p, scale, "learned")


def fake_quantize_clipped(
    x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int, scale: float = 1.0
) -> Tensor:
    """Return x_hat with PACT's gradient: s learns from clipped elements only.

    Arguments as in `fake_quantize_learned`.

    References:
        Choi et al., *PACT*, arXiv 1805.06085, eq. (3).
    """
    return _fake_quantize(x, s, z, n, p, scale, "clipped")


def add_quantization_noise(
    x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int, noise: Tensor
) -> Tensor:
    """Return x + s u inside the range and the bound outside, with gradients of both.

    Other arguments as in `fake_quantize_learned`.

    Args:
        noise: u, of x's shape, in [-1/2, 1/2].

    References:
        Shin et al., *NIPQ*, CVPR 2023, eq. (5)-(7).
    """
    return _fake_quantize(x, s, z, n, p, 1.0, "noise", noise)
