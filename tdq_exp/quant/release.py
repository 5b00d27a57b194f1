"""Details on which the paper's text and the authors' published code differ.

Which layers are quantized differs too: see `plan`.

| | text | release |
|---|---|---|
| grids | -p..p and 0..2^b - 1 | 4 bits: -6..6, 3 bits: -2..2; SiLU outputs 0..2^b - 2 |
| activations | affine, learned integer zero point | symmetric; SiLU outputs from -0.2785, fixed |
| static step | softplus(rho) | the raw number |
| LSQ's gradient scale | everywhere | weights only |
| start of s | least squared error | (mean + 3 std) / p; SiLU (mean + 16 std) / p; weights max / p |
| last layer of f | He | torch's default; dropout 0.2 before it while training |

The release adds the real number -0.2785 back after rounding; here the zero point is the integer
nearest to 0.2785 / s, so that a padded zero is exact. Its truncated pixels are `sampler.truncate`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tdq_exp.config.setting import require

SILU_MINIMUM = -0.2785


@dataclass(frozen=True)
class ReleaseDetails:
    """One choice of these details; the defaults are the paper's text.

    Args:
        reduced_grids: the release's smaller grids.
        symmetric_activations: the release's, with a fixed lower bound for SiLU outputs.
        raw_step: static intervals hold s itself.
        scale_activation_gradient: LSQ's gradient scale on activations too.
        start: `error` (least squared error) or `moments` (the release's formulas).
        he: He initialisation of the generators' last layer.
        dropout: in the generators, while training.
    """

    reduced_grids: bool = False
    symmetric_activations: bool = False
    raw_step: bool = False
    scale_activation_gradient: bool = True
    start: str = "error"
    he: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.start not in ("error", "moments"):
            raise ValueError(f"habits.habits.start={self.start!r}: choose error or moments")

        require("habits.habits.dropout", self.dropout, float, low=0, below=1)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                require(f"habits.habits.{field.name}", getattr(self, field.name), bool)
