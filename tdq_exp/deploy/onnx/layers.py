"""Quantized layers as operators of ONNX, in two forms; `onnx` puts a network together of them.

Step sizes and zero points are gathered from their tables by the graph's input t.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.deploy.integer import signed_codes
from tdq_exp.deploy.products import never_saturates
from tdq_exp.quant.layers import CodedWeight, QuantConv2d, QuantLayer
from tdq_exp.quant.quantizer import Quantizer

OPSET = 20


def op(
    kind: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any
) -> Tensor:
    """Return an operator of ONNX by name, as it will stand in the graph."""
    return torch.onnx.ops.symbolic(
        kind, inputs, attributes, dtype=dtype, shape=tuple(shape), version=OPSET
    )


class Clock:
    """The time step of the graph that is being written."""

    t: Tensor

    def gather(self, table: Tensor) -> Tensor:
        """Return the table's entry now, or its only one, 0-dim."""
        return table[0] if len(table) == 1 else table.index_select(0, self.t.reshape(1))[0]


class Reader(nn.Module):
    """The tables of a quantizer whose codes are unsigned bytes.

    Args:
        quantizer: baked, no wider than a byte.
        clock: the graph's.
        zero_type: of the table of zero points.
    """

    def __init__(self, quantizer: Quantizer, clock: Clock, zero_type: torch.dtype) -> None:
        super().__init__()
        s, z = _tables(quantizer)
        shift = -quantizer.grid.n
        self.clock, self.n, self.p = clock, 0, quantizer.grid.p + shift
        self.s: Tensor
        self.z: Tensor
        self.register_buffer("s", s)
        self.register_buffer("z", (z + shift).to(zero_type))

    def now(self) -> tuple[Tensor, Tensor]:
        """Return (s, z) at the graph's t, 0-dim."""
        return self.clock.gather(self.s), self.clock.gather(self.z)


class Codes(Reader):
    """x -> (codes uint8, s, z). Arguments as `Reader`, the first two."""

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__(quantizer, clock, torch.uint8)
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(self.n, dtype=torch.uint8))
        self.register_buffer("high", torch.tensor(self.p, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes of the shape of x, and two numbers."""
        s, z = self.now()
        codes = op("QuantizeLinear", (x, s, z), torch.uint8, x.shape)
        if (self.n, self.p) != (0, 255):
            codes = op("Clip", (codes, self.low, self.high), torch.uint8, x.shape)
        return codes, s, z


def exact_anywhere(codes: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return weights and their zero point for an operator of ONNX, in a type with exact products.

    Without VNNI instructions, ONNX Runtime adds products of unsigned by signed bytes in pairs that
    are cut off at 16 bits (see `products`); of unsigned by unsigned ones it adds all in 32 bits.
    The numbers are the same.

    Args:
        codes: int8.
        largest: code of the input.

    Returns:
        weights, zero point (0-dim): int8 and 0 if no pair can be cut off, else uint8 and 128.
    """
    if never_saturates(largest, codes):
        return codes, torch.zeros((), dtype=torch.int8)
    return (codes.to(torch.int16) + 128).to(torch.uint8), torch.tensor(128, dtype=torch.uint8)


class Simulated(nn.Module):
    """x -> x_hat: the codes, back in floats at once. Arguments as `Codes`."""

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__()
        self.codes = Codes(quantizer, clock)

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat, of the shape of x."""
        codes, s, z = self.codes(x)
        return op("DequantizeLinear", (codes, s, z), torch.float32, x.shape)


class Portable(Reader):
    """x -> (x_hat / s, s): a quantizer of constant step 1 between two multiplications.

    Arguments as `Codes`.
    """

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__(quantizer, clock, torch.float32)
        self.one: Tensor
        self.none: Tensor
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("none", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return integers held as floats, and a number."""
        s, z = self.now()
        # Rounded before z is added, as simulated quantization is: x / s + z has fewer bits left for
        # the fraction.
        v = (x / s).round().clamp(self.n - z, self.p - z) + z
        codes = op("QuantizeLinear", (v, self.one, self.none), torch.uint8, x.shape)
        return op("DequantizeLinear", (codes, self.one, self.none), torch.float32, x.shape) - z, s


class PortableLayer(nn.Module):
    """A quantized layer whose integers are held as floats.

    Args:
        layer: baked.
        reader: of its input; None if (x_hat / s, s) arrives.
    """

    def __init__(self, layer: QuantLayer, reader: Portable | None) -> None:
        super().__init__()
        self.reader = reader
        self.layer: Any = layer.layer

        coded = layer.weight_quantizer
        assert isinstance(coded, CodedWeight)
        self.conv = isinstance(layer, QuantConv2d)
        out = len(coded.codes)
        signed = coded.codes.dtype == torch.int8
        self.codes: Tensor
        self.step: Tensor
        self.zero: Tensor
        # A matrix that goes from DequantizeLinear into MatMul would be taken for a language
        # model's: ONNX Runtime fuses the two into an operator that rounds the other factor to 8
        # bits. One more axis keeps them apart.
        self.register_buffer("codes", coded.codes if self.conv else coded.codes[..., None])
        self.register_buffer("step", coded.step_size.reshape(-1).expand(out).float().clone())

        zero = (
            torch.zeros(out)
            if coded.zero_point is None
            else coded.zero_point.reshape(-1).expand(out)
        )
        self.register_buffer("zero", zero.to(torch.int8 if signed else torch.uint8).clone())

    def forward(self, x: Any) -> Tensor:
        """Return the layer's output for float input, or for what q, k and v share."""
        v, s = self.reader(x) if self.reader is not None else x
        shape, layer = self.codes.shape, self.layer
        w_hat = op(
            "DequantizeLinear", (self.codes, self.step, self.zero), torch.float32, shape, axis=0
        )
        if self.conv:
            y = F.conv2d(v, w_hat, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            return y * s + layer.bias.reshape(-1, 1, 1) if layer.bias is not None else y * s
        y = F.linear(v, w_hat.squeeze(-1)) * s
        return y if layer.bias is None else y + layer.bias


class IntegerConv(nn.Module):
    """A convolution of codes by QLinearConv.

    Args:
        layer: baked.
        reader: of its input.
        low, high: range of its first sum (see `first_sum`) over t, `[T]` each.
        clock: the graph's.
    """

    def __init__(
        self, layer: QuantLayer, reader: Codes, low: Tensor, high: Tensor, clock: Clock
    ) -> None:
        super().__init__()
        self.reader, self.clock = reader, clock
        self.layer: Any = layer.layer

        # Codes in a type whose products are exact, and what is left over for the second sum.
        coded: Any = layer.weight_quantizer
        codes, rest = signed_codes(coded)
        out = len(codes)
        codes, zero = exact_anywhere(codes, reader.p)

        self.affine = bool(rest.any())
        self.rest: Tensor
        self.ones: Tensor
        self.register_buffer("rest", (rest * coded.step_size.reshape(-1)).reshape(-1, 1, 1))
        self.register_buffer("ones", torch.ones(1, 1, *codes.shape[2:]))

        self.codes: Tensor
        self.step: Tensor
        self.zero: Tensor
        self.y_step: Tensor
        self.y_zero: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("step", coded.step_size.reshape(-1).expand(out).float().clone())
        self.register_buffer("zero", zero.expand(out).clone())

        # Step size and zero point of the output, from its range at each t, widened to hold 0.
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-10)
        self.register_buffer("y_step", step)
        self.register_buffer("y_zero", (-low / step).round().clamp(0, 255).to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `[B, C', H', W']` for `[B, C, H, W]`."""
        codes, s, z = self.reader(x)
        y_s, y_z = self.clock.gather(self.y_step), self.clock.gather(self.y_zero)

        # The graph needs the output's shape written out.
        conv = self.layer
        size = [
            (n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for n, pad, dilation, kernel, stride in zip(
                x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        ]

        shape = (x.shape[0], len(self.codes), *size)

        # The first sum, on codes; its output is quantized once more, by the range at this t.
        made = op(
            "QLinearConv",
            (codes, s, z, self.codes, self.step, self.zero, y_s, y_z),
            torch.uint8,
            shape,
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[*conv.padding, *conv.padding],
            dilations=list(conv.dilation),
            group=conv.groups,
        )

        y = op("DequantizeLinear", (made, y_s, y_z), torch.float32, shape)

        # The second sum, of affine weights: over one channel, in floats.
        if self.affine:
            sums = (codes.float() - z.float()).sum(1, keepdim=True)
            second = F.conv2d(sums, self.ones, None, conv.stride, conv.padding, conv.dilation)
            y = y + second * s * self.rest

        return y if conv.bias is None else y + conv.bias.reshape(-1, 1, 1)


class IntegerLinear(nn.Module):
    """A linear layer on codes by MatMulInteger, exact.

    Args:
        layer: baked.
        reader: of its input.
        shared: (codes, s, z) arrive, which the reader made: one of q, k and v.
    """

    def __init__(self, layer: QuantLayer, reader: Codes, shared: bool = False) -> None:
        super().__init__()
        self.reader, self.layer = None if shared else reader, layer.layer
        coded: Any = layer.weight_quantizer
        codes, rest = signed_codes(coded)

        # Codes in a type whose products are exact on every CPU.
        codes, zero = exact_anywhere(codes, reader.p)

        self.affine = bool(rest.any())
        self.codes: Tensor
        self.step: Tensor
        self.zero: Tensor
        self.rest: Tensor
        self.register_buffer("rest", rest * coded.step_size.reshape(-1))
        self.register_buffer("codes", codes.t().contiguous())
        self.register_buffer("step", coded.step_size.reshape(-1).expand(len(codes)).float().clone())
        self.register_buffer("zero", zero)

    def forward(self, x: Any) -> Tensor:
        """Return the output `[..., out]` for `[..., in]`, or for its codes."""
        codes, s, z = self.reader(x) if self.reader is not None else x
        shape = (*codes.shape[:-1], self.codes.shape[1])
        y = op("MatMulInteger", (codes, self.codes, z, self.zero), torch.int32, shape)
        y = y.float() * (self.step * s)
        if self.affine:
            y = y + (codes.float() - z.float()).sum(-1, keepdim=True) * s * self.rest
        return y if self.layer.bias is None else y + self.layer.bias


def _tables(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    tables = quantizer.tables() if quantizer.interval.baked else None
    if tables is None:
        raise ValueError(
            "a step size that is read from the input has no table;"
            " export needs one (tdq=none or temporal)"
        )
    s, z = tables
    return s.float().clone(), z.float().clone()
