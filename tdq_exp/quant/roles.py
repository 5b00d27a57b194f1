"""What a layer is for, as far as a quantization plan has to know."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "first",
    "last",
    "time_embedding",
    "time_projection",
    "conv",
    "shortcut",
    "resample",
    "attention_qkv",
    "attention_out",
)


@dataclass(frozen=True)
class Role:
    """The role of one convolution or linear layer.

    Args:
        kind: one of `KINDS`.
        block: the unit of block-wise reconstruction that it belongs to.
        after_silu: whether its input is the output of a SiLU, and so bounded below by -0.2785.
        reads: layers that name the same tensor here share one input quantizer.
    """

    kind: str
    block: str
    after_silu: bool = False
    reads: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"role {self.kind!r}: choose one of {', '.join(KINDS)}")
