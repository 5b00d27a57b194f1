"""From floats to bytes: what integer layers read, and signed codes of weights.

A `Coder` takes s and z from a table of time steps, a `DynamicCoder` from the input itself, which
costs a pass over it and keeps a norm before it from giving bytes at once. These two are for CPUs;
those of `gpu` have the same two calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.layers import CodedWeight
from tdq_exp.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Coded:
    """A quantized tensor: x_hat = s (codes - z).

    A NaN has no code. Where x holds one s is NaN, or `broken` on a GPU, and so is what comes of it.

    Args:
        codes: uint8, or int8 on a GPU; samples along the first axis.
        s: step size, a number or one for each sample, `[B]`; a table, with t.
        z: zero point of these bytes, likewise; None is 0.
        t: on a GPU, the time step to read in tables, of one element.
        broken: on a GPU, 0 or NaN, of one element: what products add to s.
    """

    codes: Tensor
    s: float | Tensor
    z: int | Tensor | None
    t: Tensor | None = None
    broken: Tensor | None = None


class ByteSource(nn.Module):
    """What gives the codes of a tensor."""

    def forward(self, x: Tensor) -> Coded:
        """Return the codes of x at the current time step."""
        raise NotImplementedError(type(self).__name__)

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Return the codes of a group norm's output, or of SiLU of it; `[B, C, H, W]`."""
        raise NotImplementedError(type(self).__name__)

    def matrix(self, quantizer: Quantizer) -> nn.Module:
        """Return simulated quantization by a baked quantizer, for a matrix inside of attention."""
        return quantizer


class Tables(nn.Module):
    """The two tables of a baked quantizer.

    Args:
        quantizer: of an activation.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        tables = quantizer.tables()
        assert tables is not None and quantizer.interval.baked
        s, z = tables
        self.n, self.p = quantizer.grid.n, quantizer.grid.p
        self.time = quantizer.interval.time
        self.step_sizes: Tensor
        self.zero_points: Tensor
        self.register_buffer("step_sizes", s.clone())
        self.register_buffer("zero_points", z.clone())

    def rows(self) -> tuple[int, int]:
        """Return the rows of s and of z at the current time step."""
        steps, zeros = len(self.step_sizes) > 1, len(self.zero_points) > 1
        if not (steps or zeros):
            return 0, 0
        assert self.time is not None
        t = self.time.index
        return t if steps else 0, t if zeros else 0


class Rounder(Tables):
    """Simulated quantization by a table, for factors of products that have no integer kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat."""
        i, j = self.rows()
        return ops.fake_quantize(
            x, self.step_sizes[i : i + 1], self.zero_points[j : j + 1], self.n, self.p
        )


def coded_input(x: Tensor | Coded, coder: ByteSource | None) -> Coded:
    """Return the input of an integer layer as codes; one that arrives as such has no coder."""
    if isinstance(x, Coded):
        return x
    assert coder is not None
    return coder(x)  # type: ignore[no-any-return]


class Coder(Tables, ByteSource):
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
        """Return the codes of x at the current time step."""
        i, j = self.rows()
        s, z = self.step_sizes[i : i + 1], self.zero_points[j : j + 1]
        codes, numbers = kernels.codes(x.float(), s, z, self.n, self.p, self.shift)
        return Coded(codes, self.steps[i] if numbers else math.nan, self.zeros[j] + self.shift)

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Return the codes of a group norm's output, or of SiLU of it; `[B, C, H, W]`."""
        i, j = self.rows()
        codes, numbers = kernels.norm_codes(
            x, norm, silu, self.steps[i], self.zeros[j], self.n, self.p, self.shift
        )
        return Coded(codes, self.steps[i] if numbers else math.nan, self.zeros[j] + self.shift)

    def matrix(self, quantizer: Quantizer) -> nn.Module:
        """Return a `Rounder` where there are tables: it reads t as a number, once."""
        return matrix_on_cpu(quantizer)


class DynamicCoder(ByteSource):
    """A quantizer that gives codes on the range of its input (`Interval.range_per_sample`).

    Args:
        quantizer: its codes no wider than a byte.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        assert quantizer.interval.range_per_sample is not None
        self.n, self.p = quantizer.grid.n, quantizer.grid.p
        self.per_sample = quantizer.interval.range_per_sample
        self.shift = -self.n

    def forward(self, x: Tensor) -> Coded:
        """Return the codes of x on its own range."""
        x = x.float()
        low, high = kernels.ranges(x)
        if not self.per_sample:
            low, high = low.min().reshape(1), high.max().reshape(1)
        s, z = ops.affine_range(low, high, self.n, self.p)
        codes, numbers = kernels.codes(x, s, z, self.n, self.p, self.shift)
        s = s if numbers else s * math.nan
        return (
            Coded(codes, s, z + self.shift)
            if self.per_sample
            else Coded(codes, float(s), int(z.nan_to_num()) + self.shift)
        )

    def of_norm(self, x: Tensor, norm: nn.GroupNorm, silu: bool) -> Coded:
        """Return the same in three passes: the range is known after the first."""
        return self(kernels.normalised(x, norm, silu))

    def matrix(self, quantizer: Quantizer) -> nn.Module:
        """Return the same as `Coder.matrix`."""
        return matrix_on_cpu(quantizer)


def matrix_on_cpu(quantizer: Quantizer) -> nn.Module:
    """Return what simulates a quantizer on a CPU; see `Coder.matrix`."""
    return Rounder(quantizer) if quantizer.tables() is not None else quantizer


def coder_of(quantizer: Quantizer) -> Coder | DynamicCoder:
    """Return the coder of a baked quantizer for a CPU."""
    return Coder(quantizer) if quantizer.tables() is not None else DynamicCoder(quantizer)


def gives_codes(quantizer: Quantizer) -> bool:
    """Return whether there is a coder of a baked quantizer: it has tables, or reads a range."""
    return quantizer.tables() is not None or quantizer.interval.range_per_sample is not None


def too_wide(quantizer: Quantizer) -> bool:
    """Return whether the codes of a quantizer do not fit into a byte."""
    return largest_code(quantizer) > 255


def largest_code(quantizer: Quantizer) -> int:
    """Return the largest of its unsigned codes, which begin at 0."""
    return quantizer.grid.p - quantizer.grid.n


def signed_codes(coded: CodedWeight) -> tuple[Tensor, Tensor]:
    """Return q_w - shift as int8, and shift - z_w by output channel as float `[out]`.

    See `integer`.
    """
    codes = coded.codes.to(torch.int16)
    rows = codes.flatten(1)
    if coded.zero_point is None:
        return codes.to(torch.int8), torch.zeros(len(codes), device=codes.device)
    zero = coded.zero_point.reshape(-1).expand(len(codes)).to(torch.int16)
    shift = torch.maximum(torch.minimum(zero, rows.amin(1) + 128), rows.amax(1) - 127)
    shifted = rows - shift[:, None]
    return shifted.to(torch.int8).reshape(codes.shape), (shift - zero).float()
