"""Quantized attention inside diffusers' networks: all that is known of its attention processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tdq_exp.quant.layers import QuantAttention
from tdq_exp.quant.quantizer import Quantizer


class AttentionProcessor(QuantAttention):
    """`QuantAttention` as a processor of diffusers' `Attention`.

    For self-attention over the pixels of a U-Net.
    """

    def __call__(  # diffusers reads this signature to know which keyword arguments may be passed
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output; see `forward`.

        Raises:
            ValueError: for cross-attention or a mask, which a diffusion U-Net over pixels does not
                use.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("quantized attention is self-attention without a mask")
        return super().__call__(attention, hidden_states)

    def forward(self, attention: Any, hidden_states: Tensor) -> Tensor:
        """Return the block's output, `[B, C, H, W]`, with a residual where the original has it."""
        batch, channels, height, width = hidden_states.shape

        h = self.read(hidden_states, attention.group_norm)
        q, k, v = attention.to_q(h), attention.to_k(h), attention.to_v(h)
        q, k, v = (_split_heads(matrix, attention.heads) for matrix in (q, k, v))
        y = self.attend(q, k, v, attention.scale)

        y = y.transpose(1, 2).reshape(batch, height * width, -1)
        y = attention.to_out[1](attention.to_out[0](y))
        y = y.transpose(1, 2).reshape(batch, channels, height, width)

        if attention.residual_connection:
            y = y + hidden_states
        return y / attention.rescale_output_factor

    def read(self, x: Tensor, norm: nn.GroupNorm | None) -> Any:
        """Return what q, k and v read, `[B, H W, C]`.

        Args:
            x: the block's input, `[B, C, H, W]`.
            norm: what is applied to it first; diffusers leaves it out of the middle block of a
                network with scale and shift unless `attn_norm_num_groups` is set.
        """
        h = x.flatten(2)
        return self.quantize_input((h if norm is None else norm(h)).transpose(1, 2))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Return `[B, heads, N, d]` of `[B, N, heads d]`."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


def quantize_attention(block: nn.Module, quantizers: Sequence[Quantizer | None]) -> None:
    """Make an attention block of diffusers use quantizers.

    Args:
        block: `Attention`; its processor is replaced.
        quantizers: of the input, q, k, v and the probabilities, as `QuantAttention` takes them.
    """
    assert isinstance(block, Attention)
    block.set_processor(AttentionProcessor(*quantizers))  # type: ignore[arg-type]
    changed: Any = block
    changed.set_processor = refuse_processor


def refuse_processor(*_: Any, **__: Any) -> NoReturn:
    """Refuse another processor, which diffusers sets to choose a kernel: quantizers would go.

    Raises:
        ValueError: in one line.
    """
    raise ValueError(
        "set_processor: attention is quantized, and another processor would drop its quantizers"
    )
