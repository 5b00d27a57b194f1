"""Integer execution on a GPU: signed bytes, tables read at a time step that stays on the device.

    y = s(t) s_w [ sum (byte - zero) q_w + rest sum (byte - zero) ] + b

The kernels, and what byte stands for zero, are described in `quant.kernels.triton_integer`. Nothing
here reads a number from the device, so a network of these layers can be recorded in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.deploy.coders import (
    ByteSource,
    Coded,
    Tables,
    coded_input,
    largest_code,
    signed_codes,
)
from tdq_exp.quant import kernels, ops
from tdq_exp.quant.kernels import integer_operators as kernel
from tdq_exp.quant.layers import CodedWeight, QuantConv2d, QuantLayer
from tdq_exp.quant.quantizer import Quantizer

BYTE = torch.iinfo(torch.int8)


def reason_against(layer: QuantLayer) -> str | None:
    """Return why the kernels can't take a layer that runs on codes elsewhere, or None."""
    original, coded = layer.layer, layer.weight_quantizer
    assert isinstance(coded, CodedWeight)
    if isinstance(original, nn.Conv2d) and original.groups > 1:
        return "it has groups"
    if coded.codes[0].numel() > kernel.MOST_PRODUCTS:
        return f"its sums are of more than {kernel.MOST_PRODUCTS} products"
    return None


class GpuLayer(nn.Module):
    """A quantized convolution or linear layer on bytes.

    Args:
        layer: baked, without a `reason_against` it.
        coder: of its input; None if the input arrives as `Coded`.
    """

    def __init__(self, layer: QuantLayer, coder: ByteSource | None) -> None:
        super().__init__()
        original: Any = layer.layer
        coded = layer.weight_quantizer
        assert isinstance(coded, CodedWeight)
        self.coder, self.conv = coder, isinstance(layer, QuantConv2d)
        self.tile: Sequence[int] = ()  # of the kernel; empty: what it takes by itself
        self.bias: Tensor | None = original.bias

        # The window's places, then the channels: as images lie in channels-last layout.
        codes, rest = signed_codes(coded)
        self.window: list[int] = []
        if self.conv:
            codes = codes.permute(0, 2, 3, 1)
            sizes = (original.kernel_size, original.stride, original.padding, original.dilation)
            self.window = [int(n) for pair in sizes for n in pair]
        rows = codes.flatten(1).contiguous()

        self.codes: Tensor
        self.w_scale: Tensor
        self.w_sum: Tensor
        self.rest: Tensor | None
        self.register_buffer("codes", rows)
        self.register_buffer(
            "w_scale", coded.step_size.reshape(-1).expand(len(rows)).float().contiguous()
        )
        self.register_buffer("w_sum", rows.sum(1, dtype=torch.int32))
        self.register_buffer("rest", rest.to(torch.int32) if bool(rest.any()) else None)

    def forward(self, x: Tensor | Coded) -> Tensor:
        """Return the output of a float or coded input: float32, or autocast's type."""
        coded = coded_input(x, self.coder)
        return self.product(coded, kernels.result_type(coded.codes))

    def product(self, x: Coded, dtype: torch.dtype) -> Tensor:
        """Return the output in a type; int32 is the exact sum in brackets."""
        codes = dense(x.codes) if self.conv else x.codes.contiguous()  # rows of channels
        return kernel.product(
            codes, self.codes, x.s, x.z, x.t, x.broken, self.w_scale, self.w_sum, self.rest,
            self.bias, self.window, dtype, list(self.tile),
        )  # fmt: skip


class GpuCoder(Tables, ByteSource):
    """A baked quantizer that gives bytes; its codes must be no wider than a byte."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        low = self.n - float(self.zero_points.max())
        high = self.p - float(self.zero_points.min())
        self.shift = None if BYTE.min <= low and high <= BYTE.max else shift_of(self.p)
        self.bytes_of_zero: Tensor | None
        self.register_buffer(
            "bytes_of_zero", None if self.shift is None else self.zero_points + self.shift
        )

    def _time(self, x: Tensor) -> Tensor | None:
        """Return the time step on x's device, or None if both tables have one entry.

        Raises:
            ValueError: if the samples of a batch have time steps of their own.
        """
        if len(self.step_sizes) == 1 and len(self.zero_points) == 1:
            return None
        assert self.time is not None
        t = self.time.t
        if t.numel() != 1:
            raise ValueError("integer layers take one time step for the whole batch")
        return t.to(x.device)

    def forward(self, x: Tensor) -> Coded:
        """Return the bytes of x at the current time step."""
        x, t = dense(kernels.readable(x)), self._time(x)
        codes, broken = kernel.codes(
            x, self.step_sizes, self.zero_points, t, self.n, self.p, self.shift
        )
        return Coded(codes, self.step_sizes, self.bytes_of_zero, t, broken)

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Return the bytes of a group norm's output, or of SiLU of it; `[B, C, H, W]`."""
        if norm.weight is None:
            y = norm(x)
            return self(F.silu(y) if silu else y)
        x, t = dense(kernels.readable(x)), self._time(x)
        codes, broken = kernel.norm_codes(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu,
            self.step_sizes, self.zero_points, t, self.n, self.p, self.shift,
        )  # fmt: skip
        return Coded(codes, self.step_sizes, self.bytes_of_zero, t, broken)


class GpuDynamicCoder(ByteSource):
    """A quantizer that gives bytes on the range of its input (`Interval.range_per_sample`).

    Args:
        quantizer: its codes no wider than a byte.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        assert quantizer.interval.range_per_sample is not None
        self.n, self.p = quantizer.grid.n, quantizer.grid.p
        self.per_sample = quantizer.interval.range_per_sample
        # z is one of the codes, so q - z is no further from 0 than their number.
        self.shift = None if largest_code(quantizer) <= BYTE.max else shift_of(self.p)

    def forward(self, x: Tensor) -> Coded:
        """Return the bytes of x on its own range."""
        x = dense(kernels.readable(x))
        axes = tuple(range(1 if self.per_sample else 0, x.dim()))
        low, high = (bound.float().reshape(-1) for bound in (x.amin(axes), x.amax(axes)))
        s, z = ops.affine_range(low, high, self.n, self.p)
        codes, broken = kernel.codes(x, s, z, None, self.n, self.p, self.shift)
        return Coded(codes, s, None if self.shift is None else z + self.shift, broken=broken)

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Return the same as `GpuCoder.of_norm`: the range is known after the norm."""
        y = norm(x)
        return self(F.silu(y) if silu else y)


def gpu_coder_of(quantizer: Quantizer) -> ByteSource:
    """Return the coder of a baked quantizer for a GPU."""
    return GpuCoder(quantizer) if quantizer.tables() is not None else GpuDynamicCoder(quantizer)


def shift_of(p: int) -> int:
    """Return what makes codes up to p signed bytes, where they can't be counted from zero."""
    return BYTE.min if p > BYTE.max else 0


def dense(x: Tensor) -> Tensor:
    """Return x with its numbers one after another, channels last if it is an image."""
    images = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.contiguous(memory_format=images)
