"""Integer execution on a GPU, in Triton: codes, codes of a group norm, and products of codes.

Codes are signed bytes, q + shift, where q is the quantizer's own code and

    shift = -z(t)    if all q - z fit into a byte, which they do up to 7 bits: zero is byte 0
    shift = -128     for 8 unsigned bits, else 0: zero is the byte z(t) + shift

so x_hat = s(t) (byte - zero). A product of bytes is added in int32, which is exact, and turned into

    y = s(t) s_w [ sum (byte - zero) q_w + rest sum (byte - zero) ] + b

in the same kernel; q_w are signed bytes, `rest` is what is left of affine weights' zero points. A
convolution is a matrix product whose rows are gathered while they are read (an implicit GEMM); what
lies beyond the border is the byte of zero, which only in the first case is 0.

A NaN has no code. A kernel that meets one stores NaN in `broken`, one number for the whole tensor,
which is 0 else; products add it to s, so all that comes of the tensor is NaN. Every program that
stores there stores the same, so nothing depends on their order.

As in `triton`, s and z are read from tables at a time step that is on the GPU, nothing waits for
the GPU, sums have a fixed order, and the same functions run under `TRITON_INTERPRET=1`.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdq_exp.quant.kernels.triton import (
    FORWARD_BLOCK,
    _clip,
    _entry,
    _on_device,
    _place,
    _round,
    _step,
    _steps,
)

PIXELS = 32  # of a norm: the partial sums of so many pixels are one pair
NORM_CHANNELS = 64  # channels of a program of a norm
FINISH_BLOCK = 256  # partial sums that are read at once


@triton.jit
def _byte(v, zero, n, p, shift, CENTRED: tl.constexpr):
    """Return the stored byte of v = x / s; that of the smallest code for a NaN."""
    low = n - zero
    high = p - zero
    v = tl.where(v == v, v, low)
    found = _round(_clip(v, low, high))
    if not CENTRED:
        found += zero + shift
    return found.to(tl.int8)


@triton.jit
def _note_nans(v, mask, broken):
    """Store NaN in `broken` if a v = x / s is one: of a NaN, or of two infinities."""
    v = tl.where(mask, v, 0.0)
    count = tl.sum((v != v).to(tl.int32))
    tl.store(broken, float("nan"), mask=count > 0)


@triton.jit(
    do_not_specialize=["blocks", "steps"],
    do_not_specialize_on_alignment=["s", "z", "t", "broken"],
)
def _codes(
    x, y, s, z, t, broken,
    width, blocks, steps, n, p, shift,
    S_STEP: tl.constexpr, Z_STEP: tl.constexpr, TABLE: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the bytes of one block of one row; S_STEP, Z_STEP and TABLE as in `triton._forward`."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column

    entry, step = _place(s, t, row, steps, S_STEP, TABLE)
    zero = tl.load(z + entry * Z_STEP).to(tl.float32)

    v = tl.math.div_rn(tl.load(x + at, mask, 0.0).to(tl.float32), step)
    _note_nans(v, mask, broken)
    tl.store(y + at, _byte(v, zero, n, p, shift, CENTRED), mask)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def _norm_sums(
    x, partial, pixels, chunks, channels,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store (mean, sum of squared differences from it) of each channel in one chunk of pixels.

    x is `[B, pixels, channels]`, partial `[B, chunks, channels, 2]`.
    """
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    chunk = program % chunks
    pixel = chunk * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = pixel < pixels
    mask = present[:, None] & (channel < channels)[None, :]

    at = (sample * pixels + pixel)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask, 0.0).to(tl.float32)

    count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)
    mean = tl.sum(value, 0) / count
    apart = tl.where(present[:, None], value - mean[None, :], 0.0)
    to = partial + 2 * ((sample * chunks + chunk) * channels + channel)
    tl.store(to, mean, channel < channels)
    tl.store(to + 1, tl.sum(apart * apart, 0), channel < channels)


@triton.jit(do_not_specialize=["pixels", "chunks", "channels", "groups", "eps"])
def _norm_finish(
    partial, moments, pixels, chunks, channels, groups, eps,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store (mean, 1 / sqrt(var + eps)) of one group of one sample, from its chunks, in float64."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    each = channels // groups
    first = (program % groups) * each
    count = chunks * each

    total = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        chunk = index // each
        at = partial + 2 * ((sample * chunks + chunk) * channels + first + index % each)
        size = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float64)
        total += tl.where(mask, size * tl.load(at, mask, 0.0).to(tl.float64), 0.0)
        start += BLOCK
    numbers = (pixels * each).to(tl.float64)
    mean = tl.sum(total) / numbers

    # Squares about the group's mean: those about each chunk's own, and those of the chunks' means.
    squares = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        chunk = index // each
        at = partial + 2 * ((sample * chunks + chunk) * channels + first + index % each)
        size = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float64)
        apart = tl.load(at, mask, 0.0).to(tl.float64) - mean
        inner = tl.load(at + 1, mask, 0.0).to(tl.float64)
        squares += tl.where(mask, inner + size * apart * apart, 0.0)
        start += BLOCK
    scale = 1.0 / tl.sqrt(tl.sum(squares) / numbers + eps)

    tl.store(moments + 2 * program, mean.to(tl.float32))
    tl.store(moments + 2 * program + 1, scale.to(tl.float32))


@triton.jit(
    do_not_specialize=["pixels", "blocks", "groups", "steps"],
    do_not_specialize_on_alignment=["s", "z", "t", "moments", "broken"],
)
def _norm_codes(
    x, y, moments, weight, bias, s, z, t, broken,
    pixels, blocks, channels, groups, steps, n, p, shift,
    SILU: tl.constexpr, S_STEP: tl.constexpr, Z_STEP: tl.constexpr, TABLE: tl.constexpr,
    CENTRED: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the bytes of one tile of a sample: weight (x - mean) scale + bias, or SiLU of it."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    mask = (pixel < pixels)[:, None] & known[None, :]

    group = moments + 2 * (sample * groups + channel // (channels // groups))
    mean = tl.load(group, known, 0.0)
    scale = tl.load(group + 1, known, 0.0) * tl.load(weight + channel, known, 0.0)
    offset = tl.load(bias + channel, known, 0.0)

    at = (sample * pixels + pixel)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))

    entry, step = _place(s, t, sample, steps, S_STEP, TABLE)
    zero = tl.load(z + entry * Z_STEP).to(tl.float32)
    v = tl.math.div_rn(value, step)
    _note_nans(v, mask, broken)
    tl.store(y + at, _byte(v, zero, n, p, shift, CENTRED), mask)


@triton.jit(
    do_not_specialize=[
        "rows", "height", "width", "out_height", "out_width",
        "stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x", "steps",
    ],
    do_not_specialize_on_alignment=["s", "z", "t", "broken"],
)  # fmt: skip
def _product(
    codes, weight, y, s, z, t, broken, w_scale, w_sum, rest, bias,
    rows, outs, channels, height, width, out_height, out_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, steps,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr,
    S_STEP: tl.constexpr, Z_STEP: tl.constexpr, TABLE: tl.constexpr, CHECKED: tl.constexpr,
    HAS_Z: tl.constexpr, AFFINE: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store one tile of the output, `[rows, outs]`: rows are output pixels of all samples.

    codes is `[B, height, width, channels]`, weight `[outs, KERNEL_Y, KERNEL_X, channels]`. With
    SUMS, y is int32 and gets the sum in brackets itself.
    """
    program = tl.program_id(0)
    out_blocks = tl.cdiv(outs, OUTS)
    row = (program // out_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = (program % out_blocks) * OUTS + tl.arange(0, OUTS)
    within = row < rows
    wanted = out < outs

    # Where the window of each output pixel begins.
    sample = row // (out_height * out_width)
    pixel = (row % (out_height * out_width)).to(tl.int32)
    top = (pixel // out_width) * stride_y - pad_y
    left = (pixel % out_width) * stride_x - pad_x
    image = sample * height * width

    if TABLE:
        one, missing = _entry(t, steps)
        entry = tl.zeros([ROWS], tl.int64) + one
        step = tl.load(s + entry * S_STEP).to(tl.float32) + missing
    else:
        entry = tl.where(within, sample, 0)
        step = tl.load(s + entry * S_STEP).to(tl.float32)
    if CHECKED:
        step += tl.load(broken)
    if HAS_Z:
        zero = tl.load(z + entry * Z_STEP).to(tl.int32)

    # One step of the loop is a block of channels at one place of the window.
    blocks = tl.cdiv(channels, CHANNELS)
    total = tl.zeros([ROWS, OUTS], tl.int32)
    sums = tl.zeros([ROWS], tl.int32)
    for number in range(0, KERNEL_Y * KERNEL_X * blocks):
        place = number // blocks
        channel = (number % blocks) * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        in_y = top + (place // KERNEL_X) * dilation_y
        in_x = left + (place % KERNEL_X) * dilation_x
        inside = within & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)

        at = (image + in_y * width + in_x) * channels
        a = tl.load(codes + at[:, None] + channel[None, :], inside[:, None] & known[None, :], 0)
        if HAS_Z:
            outside = (inside == 0)[:, None] & known[None, :]
            a = tl.where(outside, zero.to(tl.int8)[:, None], a)
        column = weight + (out * KERNEL_Y * KERNEL_X + place) * channels
        b = tl.load(column[None, :] + channel[:, None], wanted[None, :] & known[:, None], 0)

        total = tl.dot(a, b, total, out_dtype=tl.int32)
        if AFFINE:
            sums += tl.sum(a.to(tl.int32), 1)

    # Zero points: of the input, then of the weights. Steps may wrap around; the result does not.
    if HAS_Z:
        total -= zero[:, None] * tl.load(w_sum + out, wanted, 0)[None, :]
        sums -= zero * (KERNEL_Y * KERNEL_X * channels)
    if AFFINE:
        total += sums[:, None] * tl.load(rest + out, wanted, 0)[None, :]

    to = y + row[:, None] * outs + out[None, :]
    if SUMS:
        tl.store(to, total, within[:, None] & wanted[None, :])
    else:
        scale = tl.load(w_scale + out, wanted, 0.0)
        value = total.to(tl.float32) * (step[:, None] * scale[None, :])
        if HAS_BIAS:
            value += tl.load(bias + out, wanted, 0.0).to(tl.float32)[None, :]
        tl.store(to, value.to(y.dtype.element_ty), within[:, None] & wanted[None, :])


def codes(
    x: Tensor, s: Tensor, z: Tensor, t: Tensor | None, n: int, p: int, shift: int | None
) -> tuple[Tensor, Tensor]:
    """Return bytes of x, int8, in its layout, and `broken`, `[1]`: NaN if x holds one, else 0.

    Args:
        x: float32 or bfloat16; samples along the first axis, and their numbers one after another.
        s, z: float32: tables `[T]` or `[1]` with t; without, of one element or one for each sample.
        t: of one element, integer, on x's device.
        n, p: smallest and largest code.
        shift: see the module; None is -z.
    """
    y = torch.empty_like(x, dtype=torch.int8)
    rows = len(x) if t is None and (_step(s) or _step(z)) else 1
    width = x.numel() // rows
    blocks = -(-width // FORWARD_BLOCK)
    broken = torch.zeros(1, dtype=torch.float32, device=x.device)
    with _on_device(x):
        _codes[(rows * blocks,)](
            x, y, s, z, s if t is None else t, broken,
            width, blocks, _steps(s, z), float(n), float(p), float(shift or 0),
            _step(s), _step(z), t is not None, shift is None, FORWARD_BLOCK,
        )  # fmt: skip
    return y, broken


def norm_codes(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    s: Tensor, z: Tensor, t: Tensor | None, n: int, p: int, shift: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return bytes of a group norm's output, or of SiLU of it, and `broken`, as `codes` does.

    The bytes are int8, channels-last, of x's shape.

    Args:
        x: float32 or bfloat16 `[B, C, H, W]`, channels-last.
        weight, bias, groups, eps: of the norm, `[C]`.
        silu: whether SiLU comes after the norm.
        s, z, t, n, p, shift: see `codes`.
    """
    batch, channels, height, width = x.shape
    pixels, chunks = height * width, -(-height * width // PIXELS)
    y = torch.empty_like(x, dtype=torch.int8)
    partial = torch.empty(2 * batch * chunks * channels, dtype=torch.float32, device=x.device)
    moments = torch.empty(2 * batch * groups, dtype=torch.float32, device=x.device)
    tiles = (batch * chunks, -(-channels // NORM_CHANNELS))
    broken = torch.zeros(1, dtype=torch.float32, device=x.device)

    with _on_device(x):
        _norm_sums[tiles](x, partial, pixels, chunks, channels, PIXELS, NORM_CHANNELS)
        _norm_finish[(batch * groups,)](
            partial, moments, pixels, chunks, channels, groups, eps, PIXELS, FINISH_BLOCK
        )
        _norm_codes[tiles](
            x, y, moments, weight, bias, s, z, s if t is None else t, broken,
            pixels, chunks, channels, groups, _steps(s, z), float(n), float(p), float(shift or 0),
            silu, _step(s), _step(z), t is not None, shift is None, PIXELS, NORM_CHANNELS,
        )  # fmt: skip
    return y, broken


def product(
    codes: Tensor, weight: Tensor, s: Tensor, z: Tensor | None, t: Tensor | None,
    broken: Tensor | None, w_scale: Tensor, w_sum: Tensor, rest: Tensor | None, bias: Tensor | None,
    window: Sequence[int], y: Tensor, tile: Sequence[int],
) -> Tensor:  # fmt: skip
    """Write the output of a convolution or a linear layer, and return it; see the module.

    Args:
        codes: int8, `[B, C, H, W]`, channels-last, or `[B, ..., C]`.
        weight: int8, `[out, K]`, K running over the window's rows, its columns, and the channels.
        s: as in `codes`.
        z: the byte of zero, likewise; None is 0.
        t, broken: see `codes`; sums themselves are not changed.
        w_scale: step sizes of the weights, `[out]`, float32.
        w_sum: sum of each output's weights, `[out]`, int32.
        rest: of affine weights, `[out]`, int32; None is 0.
        bias: `[out]`, float32.
        window: height and width of the kernel, stride, padding and dilation, two numbers each; of
            no number for a linear layer.
        y: the output, `[B, out, H', W']`, channels-last, or `[B, ..., out]`: float32 or bfloat16,
            or int32 for the sums themselves.
        tile: of `integer.TILES`.
    """
    # A linear layer is a convolution over samples that are one column of pixels.
    geometry = tuple(window) or (1, 1, 1, 1, 0, 0, 1, 1)
    if window:
        batch, channels, height, width = codes.shape
        out_height, out_width = y.shape[2:]
    else:
        batch, channels, width, out_width = len(codes), codes.shape[-1], 1, 1
        height = out_height = codes.numel() // (batch * channels)

    rows, outs = batch * out_height * out_width, len(weight)
    block, out_block, channel_block, warps, stages = tile
    programs = -(-rows // block) * -(-outs // out_block)
    with _on_device(codes):
        _product[(programs,)](
            codes, weight, y, s, s if z is None else z, s if t is None else t,
            s if broken is None else broken, w_scale, w_sum, w_sum if rest is None else rest,
            w_scale if bias is None else bias,
            rows, outs, channels, height, width, out_height, out_width, *geometry[2:],
            _steps(s, z), geometry[0], geometry[1],
            _step(s), _step(z), t is not None, broken is not None,
            z is not None, rest is not None, bias is not None, y.dtype == torch.int32,
            block, out_block, channel_block, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y
