"""Norms that give codes: group norm, SiLU and quantization in one pass over memory.

Between its convolutions a U-Net spends its time in these three. Where they stand in a row before an
integer layer (see `quant.chains`), and before attention, the norm does the work of all three, and
the modules between pass its codes on. The norm's own sums are added in another order than torch's,
so a value that lies on the border of two codes may fall on the other side, as it may with another
batch size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.deploy.coders import ByteSource, Coded
from tdq_exp.models.attention import AttentionProcessor
from tdq_exp.quant.chains import Chains, NormChain, UpsampleChain
from tdq_exp.quant.convert import replace_module
from tdq_exp.quant.layers import QuantAttention


class CodedNorm(nn.Module):
    """A group norm that gives the codes of what follows it.

    Args:
        norm: the original.
        coder: of the layer that reads it, through SiLU if `silu`.
    """

    def __init__(self, norm: nn.GroupNorm, coder: ByteSource, silu: bool) -> None:
        super().__init__()
        self.norm, self.coder, self.silu = norm, coder, silu

    def forward(self, x: Tensor) -> Coded:
        """Return the codes of the norm's output, or of SiLU of it, `[B, C, H, W]`."""
        return self.coder.of_norm(x, self.norm, self.silu)


class Passing(nn.Module):
    """An element-wise module that passes codes on: the norm before it has done its work.

    Args:
        module: what is done to tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor | Coded) -> Tensor | Coded:
        """Return codes as they are, and module(x) of tensors."""
        return x if isinstance(x, Coded) else self.module(x)


class CodedUpsample(nn.Module):
    """Nearest-neighbour upsampling of codes, then a convolution.

    A quarter of the pixels to quantize, and a quarter of the bytes to copy.

    Args:
        conv: an integer layer.
        coder: of its input.
    """

    def __init__(self, conv: nn.Module, coder: ByteSource) -> None:
        super().__init__()
        self.conv, self.coder = conv, coder

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """Return `[B, C, H, W]` at twice the height and width, or at the size."""
        coded = self.coder(x)
        factor = None if output_size is not None else 2.0
        # Only copied: as unsigned bytes, which torch interpolates on any device.
        codes = F.interpolate(
            coded.codes.view(torch.uint8), size=output_size, scale_factor=factor, mode="nearest"
        )
        return self.conv(dataclasses.replace(coded, codes=codes.view(coded.codes.dtype)))


class CodedAttention(AttentionProcessor):
    """Quantized attention whose norm gives the codes of q, k and v.

    Arguments as `AttentionProcessor`, the coder in place of the first quantizer.
    """

    def read(self, x: Tensor, norm: nn.GroupNorm | None) -> Any:
        """Return codes, `[B, H W, C]`, of the block's input, `[B, C, H, W]`."""
        if norm is None:
            return super().read(x, None)
        coder: Any = self.input_quantizer
        coded = coder.of_norm(x, norm, False)
        codes = coded.codes.permute(0, 2, 3, 1).flatten(1, 2)
        return dataclasses.replace(coded, codes=codes)


def fuse(net: nn.Module, chains: Chains) -> None:
    """Let every norm of a network whose only reader is an integer layer give its codes, in place.

    Args:
        net: with integer layers in their places.
        chains: the network's, from its model's description.
    """
    for norm in chains.norms:
        _fuse_norm(net, norm)
    for upsample in chains.upsamples:
        _fuse_upsample(net, upsample)

    for name, module in list(net.named_modules()):
        if isinstance(module, QuantAttention):
            _fuse_attention(net, name, module)


def _fuse_norm(net: nn.Module, chain: NormChain) -> None:
    """Fuse norm and SiLU into the codes of their reader, if the reader takes codes."""
    norm, reader = net.get_submodule(chain.norm), net.get_submodule(chain.reader)
    activation = net.get_submodule(chain.activation)
    coder = getattr(reader, "coder", None)

    # The SiLU of two norms may have been wrapped for the first one already.
    wrapped = isinstance(activation, Passing)
    original = activation.module if isinstance(activation, Passing) else activation
    if coder is None or not isinstance(norm, nn.GroupNorm) or not isinstance(original, nn.SiLU):
        return

    replace_module(net, chain.norm, CodedNorm(norm, coder, silu=True))
    if not wrapped:
        replace_module(net, chain.activation, Passing(original))
    for name in chain.passed:
        replace_module(net, name, Passing(net.get_submodule(name)))
    reader.coder = None  # type: ignore[assignment]  # its input arrives in codes


def _fuse_upsample(net: nn.Module, chain: UpsampleChain) -> None:
    """Quantize before the interpolation, if the convolution takes codes."""
    conv = net.get_submodule(chain.conv)
    coder = getattr(conv, "coder", None)
    if coder is None:
        return

    conv.coder = None  # type: ignore[assignment]
    replace_module(net, chain.module, CodedUpsample(conv, coder))


def _fuse_attention(net: nn.Module, name: str, attention: QuantAttention) -> None:
    """Let the attention's norm give the codes of q, k and v, if they take codes."""
    coder = attention.input_quantizer
    if not isinstance(coder, ByteSource):
        return

    inside = (attention.q, attention.k, attention.v, attention.probabilities)
    matrices = [q if q is None else coder.matrix(q) for q in inside]
    replace_module(net, name, CodedAttention(coder, *matrices))  # type: ignore[arg-type]
