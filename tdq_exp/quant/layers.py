"""Quantized layers.

Each holds the layer that it replaces, and calls the same functional form with quantized tensors.

y = conv(x_hat, w_hat) + b
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant.quantizer import Quantizer


class CodedWeight(nn.Module):
    """A baked weight: integer codes, step size and zero point.

    w_hat = s (codes - z) is computed once, not at every step.

    Args:
        codes: integers in the smallest type that holds them, of the weight's shape.
        step_size: s, 0-dim or `[out, 1, ...]`.
        zero_point: z, of s's shape, float; None is 0.
    """

    def __init__(self, codes: Tensor, step_size: Tensor, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.codes: Tensor
        self.step_size: Tensor
        self.zero_point: Tensor | None
        self.register_buffer("codes", codes)
        self.register_buffer("step_size", step_size)
        self.register_buffer("zero_point", zero_point)
        self._w_hat: Tensor | None = None

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return w_hat, float32; the argument is not used."""
        if self._w_hat is None or self._w_hat.device != self.codes.device:
            self._w_hat = self.dequantize()
        return self._w_hat

    def dequantize(self) -> Tensor:
        """Return w_hat, computed anew and not kept."""
        codes = self.codes.to(self.step_size.dtype)
        return (codes if self.zero_point is None else codes - self.zero_point) * self.step_size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_w_hat": None}  # copies and pickles make their own

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._w_hat = None  # it belongs to the codes that are being replaced
        super()._load_from_state_dict(*args, **kwargs)


class FixedWeight(nn.Module):
    """A baked weight that is not integers times a step (DoReFa's): w_hat itself.

    Args:
        w_hat: of the weight's shape, float32.
    """

    def __init__(self, w_hat: Tensor) -> None:
        super().__init__()
        self.w_hat: Tensor
        self.register_buffer("w_hat", w_hat)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return w_hat; the argument is not used."""
        return self.w_hat


class QuantLayer(nn.Module):
    """What a quantized convolution and a quantized linear layer share.

    Args:
        layer: the original one.
        weight_quantizer: of its weight.
        input_quantizer: of its input; None if the input arrives quantized (q, k and v share one).
    """

    def __init__(
        self, layer: nn.Module, weight_quantizer: nn.Module, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_hat, w_hat)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return x, self.weight_quantizer(self.layer.weight)


class QuantConv2d(QuantLayer):
    """`nn.Conv2d` with quantized weight and input.

    Zeros are padded after quantization; z is an integer, so they are exact.
    """

    layer: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Return y, `[B, C_out, H', W']`, of x, `[B, C_in, H, W]`."""
        x_hat, w_hat = self.operands(x)
        conv = self.layer
        if conv.padding_mode != "zeros":
            x_hat = F.pad(x_hat, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            return F.conv2d(x_hat, w_hat, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
        return F.conv2d(
            x_hat, w_hat, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


class QuantLinear(QuantLayer):
    """`nn.Linear` with quantized weight and input."""

    layer: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Return y, `[..., out]`, of x, `[..., in]`."""
        x_hat, w_hat = self.operands(x)
        return F.linear(x_hat, w_hat, self.layer.bias)


class QuantAttention(nn.Module):
    """The quantizers of one attention: of its input h and of the matrices inside.

        q, k, v = W_q h, W_k h, W_v h;   A = softmax(q k^T / sqrt(d));   y = W_o (A v)

    h, q, k, v and A are quantized; h once, for q, k and v read the same tensor. How the network
    computes attention is the model's knowledge: it derives a class from this one (see
    `convert.AttentionWrapper`).

    Args:
        input_quantizer: of h; None if the three layers stay float.
        q, k, v, probabilities: quantizers of the matrices; all None leaves the products in float.
    """

    def __init__(
        self,
        input_quantizer: Quantizer | None,
        q: Quantizer | None = None,
        k: Quantizer | None = None,
        v: Quantizer | None = None,
        probabilities: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.input_quantizer = input_quantizer
        self.q, self.k, self.v, self.probabilities = q, k, v, probabilities

    def quantize_input(self, h: Tensor) -> Tensor:
        """Return what q, k and v read: `[B, N, C]`, quantized if there is a quantizer."""
        return h if self.input_quantizer is None else self.input_quantizer(h)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return A v with quantized matrices.

        Args:
            q, k, v: `[B, heads, N, d]`.
            scale: 1 / sqrt(d).

        Returns:
            `[B, heads, N, d]`.
        """
        if self.q is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        assert self.k is not None and self.v is not None and self.probabilities is not None
        q, k, v = self.q(q), self.k(k), self.v(v)
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        return torch.matmul(self.probabilities(scores.softmax(-1)), v)


def smallest_integer_type(n: int, p: int) -> torch.dtype:
    """Return the smallest integer type that holds n..p."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= n and p <= limits.max:
            return dtype
    raise ValueError(f"no integer type holds {n}..{p}")
