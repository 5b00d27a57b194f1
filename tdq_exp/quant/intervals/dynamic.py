"""Step sizes that are read from the input at run time: the baseline of the paper's Table 4."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdq_exp.quant import ops
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.time import TimeContext


class Dynamic(Interval):
    """s and z from the minimum and the maximum of whatever is quantized, at run time: the opponent of the paper's LookupTable 4.

    Args:
        per_sample: a range for each sample of a batch, or one for all, which makes an image depend on its companions.
    """

    dynamic = True

    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.per_sample = per_sample

    def start(self, s: float) -> None:
        """Nothing to set: s follows the input."""

    def affine(self, x: Tensor, n: int, p: int) -> tuple[Tensor, Tensor]:
        """(s, z) of an input, `[B]` or 0-dim, on codes n..p; without gradient."""
        x = x.detach().float()
        low, high = x.flatten(1).aminmax(dim=1) if self.per_sample else x.aminmax()
        return ops.affine_range(low, high, n, p)


class MaxAbs(Interval):
    """s = max|x| / p of whatever is quantized, as a constant: PACT's weights.

    Args:
        p: largest code of a symmetric grid.
    """

    def __init__(self, p: int) -> None:
        super().__init__()
        self.p = p

    def start(self, s: float) -> None:
        """Nothing to set: s follows the tensor."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        assert x is not None
        return x.detach().abs().amax().clamp(min=1e-12) / self.p


class DynamicIntervals:
    """Lets every activation quantizer read its range from its input.

    Args:
        per_sample: see `Dynamic`.
    """

    def __init__(self, per_sample: bool) -> None:
        self.per_sample = per_sample

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], None]:
        """One interval for each name; no bank."""
        return [Dynamic(self.per_sample) for _ in names], None
