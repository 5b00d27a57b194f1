"""Plans: which layer gets which quantizers, at how many bits.

| plan    | what stays float, or differs |
|---------|------------------------------|
| all     | nothing: every convolution and linear layer, and q, k, v and softmax inside attention |
| edge8   | the first and the last layer at 8 bits: the field's habit |
| release | float: first and last convolution, time embedding and projections, attention matrices |
| release_shortcut8 | as release, and shortcuts at 8 bits |
| float_attention | attention matrices: float, as the paper has latent models without training |

A shortcut is the 1x1 convolution beside a residual block. That of the last block reads what the
first layer made of x_t, and what it cuts off stays in the image as a bright dot
(`scripts/analysis/outliers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdq_exp.config.setting import require
from tdq_exp.quant.roles import KINDS, Role


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight and input."""

    weight: int
    act: int


class Plan:
    """Which layers are quantized, and at how many bits.

    Args:
        edge_bits: bits of the first and last layer, weights and input; None: as all others.
        keep_float: kinds of role that are not quantized.
        attention: whether to quantize q, k, v and the softmax output inside attention.
        shortcut_bits: bits of the shortcuts, weights and input; None: as all others.

    Raises:
        ValueError: for an unknown kind of role.
    """

    def __init__(
        self,
        edge_bits: int | None = None,
        keep_float: Sequence[str] = (),
        attention: bool = True,
        shortcut_bits: int | None = None,
    ) -> None:
        for name, bits in (("edge_bits", edge_bits), ("shortcut_bits", shortcut_bits)):
            if bits is not None:
                require(f"plan.plan.{name}", bits, int, low=2, high=16)
        require("plan.plan.attention", attention, bool)
        if isinstance(keep_float, str):
            raise ValueError(f"plan.plan.keep_float={keep_float}: must be a list: [{keep_float}]")

        unknown = [kind for kind in keep_float if kind not in KINDS]
        if unknown:
            choices = ", ".join(KINDS)
            raise ValueError(
                f"plan.plan.keep_float: unknown role {unknown[0]!r}; choose from {choices}"
            )
        self.edge_bits, self.shortcut_bits = edge_bits, shortcut_bits
        self.keep_float, self.attention = tuple(keep_float), attention

    def bits(self, role: Role, weight: int, act: int) -> LayerBits | None:
        """Return the bits of a layer, or None if it stays float.

        Args:
            role: of the layer.
            weight, act: bits that the recipe gives weights and activations.
        """
        if role.kind in self.keep_float:
            return None
        if self.edge_bits is not None and role.kind in ("first", "last"):
            return LayerBits(self.edge_bits, self.edge_bits)
        if self.shortcut_bits is not None and role.kind == "shortcut":
            return LayerBits(self.shortcut_bits, self.shortcut_bits)
        return LayerBits(weight, act)
