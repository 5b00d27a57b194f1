"""Step sizes that are read from the tensor itself.

| interval       | range of                               | for |
|----------------|----------------------------------------|-----|
| `Dynamic`      | the input, by sample or over the batch | activations: a baseline of the paper |
| `MaxAbs`       | the weight: -max|w|..max|w|            | PACT's weights |
| `ChannelRange` | each output channel of the weight      | weights in post-training quantization |
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdq_exp.config.setting import require
from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval, Intervals
from tdq_exp.quant.time import TimeContext


class Dynamic(Interval):
    """Step size and zero point from the minimum and the maximum of each input, at run time.

    Args:
        per_sample: a range for each sample of a batch; or one for the whole batch, which makes an
            image depend on the other images of its batch.
    """

    dynamic = True

    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.range_per_sample = per_sample

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Return (s, z), `[B]` or 0-dim, without gradient."""
        x = x.detach().float()
        low, high = x.flatten(1).aminmax(dim=1) if self.range_per_sample else x.aminmax()
        return ops.affine_range(low, high, grid.n, grid.p)


class MaxAbs(Interval):
    """s = max|w| / p on a symmetric grid, as a constant: PACT's weights."""

    dynamic = True

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Return (s, None), s 0-dim and without gradient."""
        return x.detach().abs().amax().clamp(min=1e-12) / grid.p, None


class ChannelRange(Interval):
    """s and z of each output channel of a weight, from its range, on an affine grid."""

    dynamic = True

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Return (s, z), `[out]` each, without gradient."""
        low, high = x.detach().flatten(1).aminmax(dim=1)
        return ops.affine_range(low, high, grid.n, grid.p)


class DynamicIntervals(Intervals):
    """Let every activation quantizer read its range from its input.

    Args:
        per_sample: see `Dynamic`.
    """

    dynamic = True

    def __init__(self, per_sample: bool) -> None:
        require("tdq.interval.per_sample", per_sample, bool)
        self.per_sample = per_sample

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[list[Interval], None]:
        """Return one interval for each name; no bank."""
        return [Dynamic(self.per_sample) for _ in names], None
