"""Norms that give codes: group norm, SiLU and quantization in one pass over memory where an integer layer comes next.

Between its convolutions a U-Net spends its time in these three. Where they stand in a row, in diffusers' residual blocks,
before the last convolution and before attention, the norm takes all three over, and what stood between passes codes on.
The norm's own sums are added in another order than torch's, so a value that lies on the border of two codes may fall on
the other side, as it may with another batch size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.deploy.coders import Coded, Coder, DynamicCoder, Rounder
from tdq_exp.models.attention import AttentionProcessor
from tdq_exp.quant.convert import replace_module
from tdq_exp.quant.layers import QuantAttention


class CodedNorm(nn.Module):
    """A group norm that gives the codes of what follows it.

    Args:
        norm: the original.
        coder: of the layer that reads it, through SiLU if `silu`.
    """

    def __init__(self, norm: nn.GroupNorm, coder: Coder | DynamicCoder, silu: bool) -> None:
        super().__init__()
        self.norm, self.coder, self.silu = norm, coder, silu

    def forward(self, x: Tensor) -> Coded:
        """`[B, C, H, W]`."""
        return self.coder.of_norm(x, self.norm, self.silu)


class Passing(nn.Module):
    """An element-wise module that lets codes through, which have it behind them.

    Args:
        module: for tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor | Coded) -> Tensor | Coded:
        """Codes as they are, module(x) of tensors."""
        return x if isinstance(x, Coded) else self.module(x)


class CodedUpsample(nn.Module):
    """Nearest neighbours, then a convolution: a quarter of the pixels to quantize, a quarter of the bytes to copy.

    Args:
        conv: an integer layer.
        coder: of its input.
    """

    def __init__(self, conv: nn.Module, coder: Coder | DynamicCoder) -> None:
        super().__init__()
        self.conv, self.coder = conv, coder

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """`[B, C, H, W]` -> twice the height and width, or the size."""
        coded = self.coder(x)
        factor = None if output_size is not None else 2.0
        codes = F.interpolate(coded.codes, size=output_size, scale_factor=factor, mode="nearest")
        return self.conv(Coded(codes, coded.s, coded.z))


class CodedAttention(AttentionProcessor):
    """Quantized attention whose norm gives the codes of q, k and v. Arguments as `QuantAttention`, the coder first."""

    def read(self, attention: Any, x: Tensor) -> Any:
        """`[B, C, H, W]` -> codes `[B, H W, C]`."""
        assert isinstance(self.input_quantizer, nn.Module)
        coded = self.input_quantizer.of_norm(x, attention.group_norm, False)  # type: ignore[operator]
        return Coded(coded.codes.permute(0, 2, 3, 1).flatten(1, 2), coded.s, coded.z)


def fuse(net: nn.Module) -> None:
    """Lets every norm of a network whose only reader is an integer layer give its codes, in place."""
    for module in list(net.modules()):
        _fuse_pair(module, "conv_norm_out", "conv_act", "conv_out")
        whole = getattr(module, "time_embedding_norm", None) == "default"
        if whole and getattr(module, "upsample", True) is None and getattr(module, "downsample", True) is None:
            _fuse_pair(module, "norm1", "nonlinearity", "conv1")
        if whole and _fuse_pair(module, "norm2", "nonlinearity", "conv2"):
            module.dropout = Passing(module.dropout)  # type: ignore[arg-type]
    for name, module in list(net.named_modules()):
        conv = getattr(module, "conv", None)
        coder = getattr(conv, "coder", None)
        nearest = getattr(module, "interpolate", False) and getattr(module, "norm", True) is None
        if nearest and isinstance(conv, nn.Module) and coder is not None:
            conv.coder = None  # type: ignore[assignment]
            replace_module(net, name, CodedUpsample(conv, coder))  # type: ignore[arg-type]
    for module in list(net.modules()):
        processor = getattr(module, "processor", None)
        if isinstance(processor, QuantAttention) and isinstance(processor.input_quantizer, Coder | DynamicCoder):
            inside = (processor.q, processor.k, processor.v, processor.probabilities)
            module.processor = CodedAttention(
                processor.input_quantizer,  # type: ignore[arg-type]
                *(q if q is None or q.interval.dynamic else Rounder(q) for q in inside),  # type: ignore[arg-type]
            )


def _fuse_pair(owner: nn.Module, norm: str, activation: str, reader: str) -> bool:
    """Fuses norm and SiLU of an owner into the codes of a layer, if it has these three and the layer takes codes."""
    first, silu, layer = (getattr(owner, name, None) for name in (norm, activation, reader))
    coder = getattr(layer, "coder", None)
    original = silu.module if isinstance(silu, Passing) else silu
    if not (isinstance(first, nn.GroupNorm) and isinstance(original, nn.SiLU) and coder is not None):
        return False
    setattr(owner, norm, CodedNorm(first, coder, silu=True))
    setattr(owner, activation, silu if isinstance(silu, Passing) else Passing(original))
    layer.coder = None  # type: ignore[union-attr]
    return True
