"""A quantizer: grid x interval x zero point, and the rule that a subclass adds.

    x_hat = s (clip(round(x / s) + z, n, p) - z)

In eval every rule is this formula. While training, the subclass says how gradients pass (`lsq`, `pact`, `nipq`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.quant import kernels, ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.intervals.dynamic import Dynamic
from tdq_exp.quant.zero_point import TableZeroPoint


class Quantizer(nn.Module):
    """Grid, interval and zero point of one tensor. Subclasses define `rule`.

    Args:
        grid: which codes.
        interval: where s comes from.
        zero_point: where z comes from; None is z = 0.
        scale_gradient: LSQ's `1 / sqrt(N p)` on the gradient of s.
    """

    scales_gradient = False  # LSQ's rule does
    integer = True  # is x_hat an integer times s? DoReFa's literal weights are not
    fixed = False  # of a weight: one tensor, not one per sample; set when a network is quantized
    # What calibration takes as the start of s and z: `error` (least squares), `max`, `range` (minimum and maximum), or
    # nothing, where they follow the `tensor`.
    start_by = "error"

    def __init__(
        self, grid: Grid, interval: Interval, zero_point: nn.Module | None = None, scale_gradient: bool = True
    ) -> None:
        super().__init__()
        self.grid, self.interval, self.zero_point = grid, interval, zero_point
        self.scale_gradient = scale_gradient
        self.observer: Any = None  # while calibrating: receives what passes, and nothing is quantized
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def start(self, s: float, z: int) -> None:
        """Sets the start values that calibration found."""
        self.interval.start(s)
        if self.zero_point is not None:
            self.zero_point.start(s, z)  # type: ignore[operator]

    def parameters_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(s, z) for x at the current time step, broadcastable to x."""
        if isinstance(self.interval, Dynamic):
            s, z = self.interval.affine(x, self.grid.n, self.grid.p)
        else:
            s = self.interval(x)
            if self.training and s.requires_grad:
                # Before the zero point takes its part: where z follows s, both ways back to s must weigh alike.
                s = ops.scale_gradient(s, self.gradient_scale(x))
            z = self.zero if self.zero_point is None else self.zero_point(s)
        if s.dim():
            s = s.reshape(-1, *[1] * (x.dim() - 1))
        return s, z.reshape(-1, *[1] * (x.dim() - 1)) if z.dim() else z

    def forward(self, x: Tensor) -> Tensor:
        """x_hat, float32, or autocast's type on a GPU (see `kernels.result_type`)."""
        if self.observer is not None:
            self.observer(x)
            return x
        # The arithmetic of quantizers stays in float32 under autocast.
        x = kernels.readable(x)
        if not self.training and not torch.is_grad_enabled():
            lookup = self.interval.lookup()
            if lookup is not None:
                return ops.fake_quantize_at(x, *lookup, self._zero_points(), self.grid.n, self.grid.p)

        s, z_or_zero = self.parameters_at(x)
        z = None if self.zero_point is None and not self.interval.dynamic else z_or_zero
        if self.training:
            return self.rule(x, s, z)
        if torch.is_grad_enabled():  # evaluated inside of somebody's graph: the same numbers, differentiable
            return ops.fake_quantize_learned(x, s, z, self.grid.n, self.grid.p)
        return ops.fake_quantize(x, s, z, self.grid.n, self.grid.p)

    def _zero_points(self) -> Tensor | None:
        """The zero point's table, `[T]` or `[1]`, of a baked quantizer; None is 0."""
        zero_point = self.zero_point
        return zero_point.zero_points if isinstance(zero_point, TableZeroPoint) else None

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """x_hat with the gradients of a method."""
        raise NotImplementedError(type(self).__name__)

    def penalty(self) -> Tensor | None:
        """Return what this rule adds to the loss at the current time steps, 0-dim; None for nothing."""
        return None

    def set_final_phase(self, final: bool) -> None:
        """Hear whether training is in its final phase, in which `rule` must compute what inference does.

        Only rules that train in two phases need it.
        """

    def gradient_scale(self, x: Tensor) -> float:
        """LSQ's `1 / sqrt(N p)`, if it is on; N counts the elements that one s is for, activations per sample."""
        if not self.scale_gradient or not self.scales_gradient:
            return 1.0
        elements = x.numel() if self.fixed else x[0].numel()
        return float((elements * self.grid.p) ** -0.5)

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor]:
        """(s, z) for every time step: `[T]` each, or `[1]` where they do not depend on t; none for a `Dynamic` interval."""
        s = self.interval.table()
        if self.zero_point is None:
            return s, self.zero.reshape(1)
        if isinstance(self.zero_point, TableZeroPoint):
            return s, self.zero_point.zero_points
        z = self.zero_point(s if self.zero_point.timed else s[:1])
        return s, z.reshape(-1)

    def extra_repr(self) -> str:
        return f"codes {self.grid.n}..{self.grid.p}"
