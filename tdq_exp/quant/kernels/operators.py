"""The fused kernels as operators of torch, for whoever records operations in place of doing them.

torch.compile, torch.export, torch.jit.trace, make_fx and FakeTensorMode see one operator with known
shapes, types and layouts, whichever kernel computes it in the end; without any, single tensor
operations do. Plain tensors do not come here: an operator written in Python costs more for each
call than the kernels themselves take on a small network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdq_exp.quant.kernels import plain
from tdq_exp.quant.kernels.choice import fused, kernels_for
from tdq_exp.quant.kernels.cpu import dense, like


@torch.library.custom_op("tdq_exp::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return x_hat of a dense x. Arguments as `ops.fake_quantize_learned`, and

    Args:
        kind: `learned`, `clipped` or `noise`.
        noise: u, in x's layout.
        dtype: of x_hat.
    """
    if fused(x, s, z):
        return kernels_for(x).forward(x, s, z, n, p, noise, dtype)
    return plain.forward(x.float(), s, z, n, p, noise)[1].to(dtype)


@fake_quantize.register_fake
def _(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("tdq_exp::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (g_x, g_s, g_z) of the shapes of x, s and z; without z, the last one is empty."""
    g = like(x, g)
    if fused(x, s, z):
        g_x, g_s, g_z = kernels_for(x).backward(g, x, s, z, n, p, scale, kind, noise)
    else:
        v, x_hat = plain.forward(x.float(), s, z, n, p, noise)
        g_wide = g.float()
        g_x = plain.gradient_of_input(g_wide, v, z, n, p)
        g_s = plain.gradient_of_step_size(g_wide, g_x, v, x_hat, s, scale, kind == "clipped")
        g_z = None if z is None else plain.gradient_of_zero_point(g_wide, g_x, s, z)
        g_x = like(x, g_x.to(x.dtype))
    return g_x, g_s, s.new_empty(0) if g_z is None else g_z


@fake_quantize_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    g_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    if z is None:
        return torch.empty_like(x), g_s, s.new_empty(0)
    return torch.empty_like(x), g_s, torch.empty_like(z, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, s, z, *numbers, noise, _ = inputs
    ctx.save_for_backward(x, s, z, noise)
    ctx.numbers = numbers


def _gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, s, z, noise = ctx.saved_tensors
    g_x, g_s, g_z = fake_quantize_backward(g, x, s, z, *ctx.numbers, noise)
    return g_x, g_s, None if z is None else g_z, None, None, None, None, None, None


fake_quantize.register_autograd(_gradients, setup_context=_keep)


def traced_fake_quantize(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    codes: tuple[int, int],
    scale: float,
    kind: str,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Call the operator with everything in the layout that it asks for."""
    x = dense(x)
    noise = None if noise is None else like(x, noise)
    return fake_quantize(x, s, z, *codes, scale, kind, noise, dtype)
