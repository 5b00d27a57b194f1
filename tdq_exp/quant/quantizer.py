"""A quantizer: grid, step size and zero point of one tensor, and the rule that a subclass adds.

    s, z  = interval(x, grid)          step size, and zero point if the range gives it
    s     = transform_step(s)          the rule's, identity by default
    z     = zero_point(s)              if the slot is filled
    x_hat = s (clip(round(x / s) + z, n, p) - z)

In eval every rule computes this formula, and `bake` writes the same s and z into tables. While
training, a subclass says how gradients pass (`rule`), and may have a penalty and two phases.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.quant import kernels, ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.zero_point import ZeroPointSource


class Quantizer(nn.Module):
    """Grid, interval and zero point of one tensor. Subclasses define `rule`.

    Args:
        grid: which codes.
        interval: where s comes from.
        zero_point: where z comes from; None is z = 0, or the interval's own.
        gradient_scale: LSQ's `1 / sqrt(N p)` on the gradient of s, for rules that have it.
    """

    integer = True  # is x_hat an integer times s? DoReFa's literal weights are not
    fixed = False  # a weight: one tensor, not one per sample; set when a network is quantized
    # What calibration takes as the start of s and z: `error` (least squares), `max` (largest
    # magnitude) or `range` (minimum and maximum).
    start_by = "error"

    def __init__(
        self,
        grid: Grid,
        interval: Interval,
        zero_point: ZeroPointSource | None = None,
        gradient_scale: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.interval, self.zero_point = grid, interval, zero_point
        self.gradient_scale = gradient_scale
        # While calibrating it receives what passes, and nothing is quantized.
        self.observer: Any = None
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    # --- What a rule may define

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return x_hat with the gradients of a method, while training.

        In the final phase the values must be those of the formula above: `check_rule` refuses
        others.

        Args:
            x: float32, any shape.
            s: step size, broadcastable to x.
            z: zero point, broadcastable to x, an integer held as float; None is 0.
        """
        raise NotImplementedError(type(self).__name__)

    def differentiable(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return the formula's x_hat in eval, inside of somebody's graph: LSQ's gradients."""
        return ops.fake_quantize_learned(x, s, z, self.grid.n, self.grid.p)

    def transform_step(self, s: Tensor) -> Tensor:
        """Return the step size that is used where the interval gives s: here s itself.

        Training, eval, tables and codes all use it, so a rule that restricts step sizes does so
        here. Each element is transformed by itself; gradients are the rule's own affair.
        """
        return s

    def gradient_factor(self, x: Tensor) -> float:
        """Return what the gradient of s is multiplied by."""
        return 1.0

    def penalty(self) -> Tensor | None:
        """Return what this rule adds to the loss at the current time steps, 0-dim, or None."""
        return None

    def set_final_phase(self, final: bool) -> None:
        """Take note of whether training is in its final phase, for rules that have two."""

    # --- What all rules share

    @property
    def transforms_step(self) -> bool:
        """Return whether this rule changes the step size that its interval gives."""
        return type(self).transform_step is not Quantizer.transform_step

    def start(self, s: float, z: int) -> None:
        """Set the start values that calibration found."""
        self.interval.start(s)
        if self.zero_point is not None:
            self.zero_point.start(s, z)

    def parameters_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (s, z) for x at the current time step, broadcastable to x."""
        s, z = self._step_and_zero(x)
        return s, self.zero if z is None else z

    def _step_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s, z = self.interval(x, self.grid)
        if not self.interval.baked:  # a table holds what was transformed already
            s = self.transform_step(s)

        # Before the zero point takes its part: where z follows s, both ways back to s must weigh
        # alike.
        if self.training and s.requires_grad:
            s = ops.multiply_gradient(s, self.gradient_factor(x))
        if self.zero_point is not None:
            z = self.zero_point(s)

        # One value for each element of the first axis: samples, or output channels of a weight.
        rows = (-1, *[1] * (x.dim() - 1))
        if s.dim():
            s = s.reshape(rows)
        if z is not None and z.dim():
            z = z.reshape(rows)
        return s, z

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat, of x's shape.

        float32, or autocast's type on a GPU (see `kernels.result_type`).
        """
        if self.observer is not None:
            self.observer(x)
            return x

        n, p = self.grid.n, self.grid.p
        x = kernels.readable(x)  # the arithmetic of quantizers stays in float32 under autocast

        # Inference from tables, at one time step: a kernel reads the entries itself.
        if not self.training and not torch.is_grad_enabled():
            lookup = self.interval.lookup()
            if lookup is not None:
                s, t = lookup
                z = None if self.zero_point is None else self.zero_point.table(s)
                return ops.fake_quantize_at(x, s, t, z, n, p)

        s, z = self._step_and_zero(x)
        if self.training:
            return self.rule(x, s, z)
        if torch.is_grad_enabled():
            return self.differentiable(x, s, z)
        return ops.fake_quantize(x, s, z, n, p)

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Return (s, z) for every time step: `[T]` each, or `[1]` where they do not depend on t.

        None if they are read from the input.
        """
        s = self.interval.table()
        if s is None:
            return None
        if not self.interval.baked:
            s = self.transform_step(s)
        return s, self.zero.reshape(1) if self.zero_point is None else self.zero_point.table(s)

    # --- State dict: its metadata say the codes, without which step sizes mean nothing

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["codes"] = [self.grid.n, self.grid.p]

    def _load_from_state_dict(  # torch's hook, and its arguments
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine, theirs = [self.grid.n, self.grid.p], local_metadata.get("codes")
        if theirs is not None and theirs != mine:
            error_msgs.append(
                f"{prefix[:-1]}: its state is of codes {theirs[0]}..{theirs[1]}, not"
                f" {mine[0]}..{mine[1]}: quantize with the same bits, plan and habits"
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        """Return the codes, for printing."""
        return f"codes {self.grid.n}..{self.grid.p}"


@torch.no_grad()
def check_rule(quantizer: Quantizer, s: Tensor | None = None, z: Tensor | None = None) -> None:
    """Compare a rule's training output in its final phase with the formula that inference computes.

    Eval, tables and codes never call `rule`, so a rule that changes values trains one network and
    ships another. Values over twice the range of the grid are tried, between the codes and on them.

    Args:
        quantizer: in any state; nothing is changed.
        s, z: 0-dim; by default a step size of 0.3, and the middle of an affine grid.

    Raises:
        ValueError: if the two differ by more than rounding errors.
    """
    if not quantizer.integer:
        return  # such a rule has one formula, for training and eval

    n, p = quantizer.grid.n, quantizer.grid.p
    s = torch.tensor(0.3, device="cpu") if s is None else s
    if z is None and n == 0:
        z = torch.tensor(float(p // 2), device=s.device)

    # What inference computes.
    codes = torch.linspace(2 * n - p, 2 * p - n, 401, device=s.device) - (0 if z is None else z)
    x = (codes * s).reshape(1, -1)
    expected = ops.fake_quantize(x, s, z, n, p)

    # What training computes at the end, without a trace of it.
    twin = copy.copy(quantizer)  # shares everything; only its phase and mode are its own
    twin.set_final_phase(True)
    twin.training = True
    with torch.random.fork_rng(devices=[]):
        found = twin.rule(x, s, z)

    wrong = (found - expected).abs() > 1e-3 * s + 1e-5 * expected.abs()
    if bool(wrong.any()):
        i = int(wrong.flatten().float().argmax())
        name = type(quantizer).__name__
        at_x, gives, wanted = (float(v.flatten()[i]) for v in (x, found, expected))
        raise ValueError(
            f"{name}.rule changes values: {gives:.6g} for x = {at_x:.6g}, s = {float(s):.6g}, where"
            f" inference computes {wanted:.6g}. A rule may change gradients only; what changes s"
            f" belongs in {name}.transform_step(s)"
        )
