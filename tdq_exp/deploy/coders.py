"""From floats to bytes: what integer layers read.

A `Coder` takes s and z from a table of time steps, a `DynamicCoder` from the input itself, which
costs a pass over it and keeps a norm before it from giving bytes at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.intervals.base import LookupTable
from tdq_exp.quant.intervals.dynamic import Dynamic
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.zero_point import TableZeroPoint


@dataclass(frozen=True)
class Coded:
    """A quantized tensor: x_hat = s (codes - z).

    Args:
        codes: uint8, samples along the first axis.
        s: step size, a number or one for each sample, `[B]`.
        z: zero point of these bytes, likewise.
    """

    codes: Tensor
    s: float | Tensor
    z: int | Tensor


class Tables(nn.Module):
    """The two tables of a baked quantizer.

    Args:
        quantizer: of an activation.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        interval, zero = quantizer.interval, quantizer.zero_point
        assert isinstance(interval, LookupTable) and isinstance(zero, TableZeroPoint)
        self.n, self.p = quantizer.grid.n, quantizer.grid.p
        self.time = interval.time
        self.step_sizes: Tensor
        self.zero_points: Tensor
        self.register_buffer("step_sizes", interval.step_sizes.clone())
        self.register_buffer("zero_points", zero.zero_points.clone())

    def rows(self) -> tuple[int, int]:
        """Of s and of z at the current time step."""
        steps, zeros = len(self.step_sizes) > 1, len(self.zero_points) > 1
        if not (steps or zeros):
            return 0, 0
        assert self.time is not None
        t = self.time.index
        return t if steps else 0, t if zeros else 0


class Rounder(Tables):
    """Simulated quantization by a table, for factors of products that have no integer kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x_hat."""
        i, j = self.rows()
        return ops.fake_quantize(
            x, self.step_sizes[i : i + 1], self.zero_points[j : j + 1], self.n, self.p
        )


class Coder(Tables):
    """A baked quantizer that gives codes; they must be no wider than a byte."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.shift = -self.n  # codes begin at 0: the smaller they are, the more products are exact
        # Also as numbers: oneDNN's kernels take them by value.
        self.steps, self.zeros = (
            self.step_sizes.tolist(),
            [int(z) for z in self.zero_points.tolist()],
        )

    def forward(self, x: Tensor) -> Coded:
        """Codes of x at the current time step."""
        i, j = self.rows()
        s, z = self.step_sizes[i : i + 1], self.zero_points[j : j + 1]
        return Coded(
            kernels.codes(x.float(), s, z, self.n, self.p, self.shift),
            self.steps[i],
            self.zeros[j] + self.shift,
        )

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Codes of a group norm's output, or of SiLU of it; `[B, C, H, W]`."""
        i, j = self.rows()
        codes = kernels.norm_codes(
            x, norm, silu, self.steps[i], self.zeros[j], self.n, self.p, self.shift
        )
        return Coded(codes, self.steps[i], self.zeros[j] + self.shift)


class DynamicCoder(nn.Module):
    """A quantizer with a `Dynamic` interval that gives codes.

    Args:
        quantizer: its codes no wider than a byte.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        assert isinstance(quantizer.interval, Dynamic)
        self.n, self.p, self.per_sample = (
            quantizer.grid.n,
            quantizer.grid.p,
            quantizer.interval.per_sample,
        )
        self.shift = -self.n

    def forward(self, x: Tensor) -> Coded:
        """Codes of x on its own range."""
        x = x.float()
        low, high = kernels.ranges(x)
        if not self.per_sample:
            low, high = low.min().reshape(1), high.max().reshape(1)
        s, z = ops.affine_range(low, high, self.n, self.p)
        codes = kernels.codes(x, s, z, self.n, self.p, self.shift)
        return (
            Coded(codes, s, z + self.shift)
            if self.per_sample
            else Coded(codes, float(s), int(z) + self.shift)
        )

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """As `Coder.of_norm`, in three passes: the range is known after the first."""
        return self(kernels.normalised(x, norm, silu))


def coder_of(quantizer: Quantizer) -> Coder | DynamicCoder:
    """The coder of a baked quantizer."""
    return DynamicCoder(quantizer) if quantizer.interval.dynamic else Coder(quantizer)


def too_wide(quantizer: Quantizer) -> bool:
    """Do its codes not fit into a byte?"""
    return largest_code(quantizer) > 255


def largest_code(quantizer: Quantizer) -> int:
    """Return the largest of its unsigned codes, which begin at 0."""
    return quantizer.grid.p - quantizer.grid.n
