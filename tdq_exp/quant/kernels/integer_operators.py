"""Integer execution on a GPU as functions of tensors, and as operators of torch.

Arguments and formulas: see `triton_integer`. On a GPU its kernels compute; on a CPU, single tensor
operations do, slowly and with the same integers, so that all that is built of these functions can
be tried without a GPU. Whoever records operations (see `switch.traced`) sees one operator each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdq_exp.quant.kernels.choice import used
from tdq_exp.quant.kernels.switch import traced

CAPABILITY = (8, 0)  # of a GPU: older ones have no products of bytes that Triton knows
MOST_PRODUCTS = 2**15  # in a sum: 255 * 255 times as much fits into int32

# Tiles of a product: rows and outputs of the output's, channels of the input's, warps, and stages
# of the pipeline. The first four must be powers of 2.
TILES = (
    (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 64, 128, 4, 3),
    (64, 64, 128, 4, 4),
    (64, 128, 64, 4, 3),
)


def default_tile(rows: int, outs: int) -> tuple[int, ...]:
    """Return a tile that leaves no processor idle and wastes few outputs, without measuring."""
    if rows < 2**14:
        return TILES[3]
    return TILES[0] if outs > 64 else TILES[2]


def unavailable(device: torch.device) -> str | None:
    """Return why a GPU has no integer kernels here, in one line, or None."""
    if not torch.cuda.is_available() or not torch.empty(0, device=device).is_cuda:
        return f"there are no integer kernels for {device.type} here"
    if torch.version.hip is not None:
        return "the integer kernels are for NVIDIA's GPUs"

    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        wanted, here = (".".join(str(part) for part in version) for version in (CAPABILITY, found))
        return f"integer kernels need compute capability {wanted}, and this GPU has {here}"

    fused = used(device)
    return None if fused.startswith("fused") else f"no integer kernels: {fused}"


def by_triton(x: Tensor) -> bool:
    """Return whether Triton's kernels compute on such a tensor."""
    return x.is_cuda


def _codes(
    x: Tensor, s: Tensor, z: Tensor, t: Tensor | None, n: int, p: int, shift: int | None
) -> tuple[Tensor, Tensor]:
    if by_triton(x):
        from tdq_exp.quant.kernels import triton_integer

        return triton_integer.codes(x, s, z, t, n, p, shift)

    s, zero = (_entry(value, t, x.dim()) for value in (s, z))
    v = x.float() / s
    broken = torch.zeros(1, device=x.device).masked_fill_(v.isnan().any(), torch.nan)
    v.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    found = torch.minimum(torch.maximum(v, n - zero), p - zero).round_()
    return (found if shift is None else found + (zero + shift)).to(torch.int8), broken


def _norm_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    s: Tensor,
    z: Tensor,
    t: Tensor | None,
    n: int,
    p: int,
    shift: int | None,
) -> tuple[Tensor, Tensor]:
    if by_triton(x):
        from tdq_exp.quant.kernels import triton_integer

        return triton_integer.norm_codes(x, weight, bias, groups, eps, silu, s, z, t, n, p, shift)
    y = F.group_norm(x.float(), groups, weight, bias, eps)
    found, broken = _codes(F.silu(y) if silu else y, s, z, t, n, p, shift)
    return found.contiguous(memory_format=torch.channels_last), broken


def _product(
    codes: Tensor,
    weight: Tensor,
    s: Tensor,
    z: Tensor | None,
    t: Tensor | None,
    broken: Tensor | None,
    w_scale: Tensor,
    w_sum: Tensor,
    rest: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:
    y = like_output(codes, len(weight), window, dtype)
    if by_triton(codes):
        from tdq_exp.quant.kernels import triton_integer

        return triton_integer.product(
            codes, weight, s, z, t, broken, w_scale, w_sum, rest, bias, window, y,
            tile or default_tile(y.numel() // len(weight), len(weight)),
        )  # fmt: skip

    # In double precision, which holds sums of this size.
    channels = (-1, 1, 1) if window else (-1,)
    x, w = codes.double(), weight.double()
    if z is not None:
        x = x - _entry(z, t, x.dim())
    if rest is not None:
        w = w + rest[:, None]
    if window:
        kernel, stride, padding, dilation = _pairs(window)
        w = w.reshape(len(w), *kernel, -1).permute(0, 3, 1, 2)
        total = F.conv2d(x, w, None, stride, padding, dilation)
    else:
        total = F.linear(x, w)
    if dtype == torch.int32:
        return y.copy_(total)
    step = _entry(s, t, x.dim()) if broken is None else _entry(s, t, x.dim()) + broken
    value = total.float() * (step * w_scale.reshape(channels))
    return y.copy_(value if bias is None else value + bias.reshape(channels))


def like_output(codes: Tensor, outs: int, window: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty output of a product, in its shape and layout."""
    if not window:
        return codes.new_empty(*codes.shape[:-1], outs, dtype=dtype)

    kernel, stride, padding, dilation = _pairs(window)
    height, width = (
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(codes.shape[2:])
    )
    return torch.empty(
        (len(codes), outs, height, width),
        dtype=dtype,
        device=codes.device,
        memory_format=torch.channels_last,
    )


def _pairs(window: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (kernel, stride, padding, dilation), height and width of each."""
    return tuple((window[i], window[i + 1]) for i in range(0, 8, 2))


def _entry(values: Tensor, t: Tensor | None, axes: int) -> Tensor:
    """Return one number for all samples, or one for each, for a tensor of so many axes."""
    if t is not None and len(values) > 1:
        return values.index_select(0, t.reshape(1))
    return values.reshape(-1, *[1] * (axes - 1)) if len(values) > 1 else values


codes_operator = torch.library.custom_op("tdq_exp::codes", _codes, mutates_args=())
norm_codes_operator = torch.library.custom_op("tdq_exp::norm_codes", _norm_codes, mutates_args=())
product_operator = torch.library.custom_op("tdq_exp::integer_product", _product, mutates_args=())


@codes_operator.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(1, dtype=torch.float32)


@norm_codes_operator.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.channels_last)
    return codes, x.new_empty(1, dtype=torch.float32)


@product_operator.register_fake
def _(codes: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *_, window, dtype, _tile = arguments
    return like_output(codes, len(weight), window, dtype)


def codes(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return bytes of x, and whether it holds a NaN; arguments as `triton_integer.codes`."""
    return (codes_operator if traced(x) else _codes)(x, *arguments)


def norm_codes(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the same of a group norm of x; arguments as `triton_integer.norm_codes`."""
    return (norm_codes_operator if traced(x) else _norm_codes)(x, *arguments)


def product(codes: Tensor, *arguments: Any) -> Tensor:
    """Return a layer's output.

    Arguments as `triton_integer.product`, with the output's type in place of the output.
    """
    return (product_operator if traced(codes) else _product)(codes, *arguments)
