"""TDQ: a step size that is a learned function of the time step. The method of the paper.

    I(t) = enc(t):  cos and sin of t 10000^(-2i/d), i < d/2 (cos first, as released);
                    or t / T alone, for an ablation
    s(t) = softplus(f(I(t))),  f: linear layers with ReLU between, one small network per quantizer

Here are the networks f of all quantizers (`GeneratorBank`), the interval that a
quantizer holds (`Temporal`) and what configurations name (`TemporalIntervals`).

All networks f have the same shape, so their weights are stacked, `[Q, out, in]`, and one batched
product per layer gives the whole `[Q, B]` matrix of step sizes; each quantizer reads its row. In
eval the matrix is read from a table over all T, made by the same function that baking calls: two
ways of computing it would differ in the last bit, and rounding would amplify that.

Source: So et al., *Temporal Dynamic Quantization for Diffusion Models*, NeurIPS 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.config.setting import require
from tdq_exp.quant.intervals.base import Bank, Interval, Intervals, inverse_softplus
from tdq_exp.quant.intervals.cache import Cache
from tdq_exp.quant.intervals.encoding import encode_time, scaled_time
from tdq_exp.quant.intervals.recomputation import of_no_block, same_draws
from tdq_exp.quant.ops import at, pass_straight_through
from tdq_exp.quant.time import TimeContext

MOST_WIDTH, MOST_LAYERS = 1 << 14, 64  # beyond these a number is a slip of the keyboard


@dataclass(frozen=True)
class GeneratorOptions:
    """The networks f: their shape, and how they start.

    Args:
        encoding: d, width of enc(t).
        width: of the hidden layers of f.
        layers: linear layers of f; the paper finds quality stable from 4 on.
        dropout: before the last layer, while training (release: 0.2).
        he: He initialisation of the last layer (the paper), or torch's default everywhere
            (release). On all layers it would spread s(t) / s0 over 0.2..5.6.
        raw_time: f reads t / T in place of enc(t).
    """

    encoding: int
    width: int = 64
    layers: int = 4
    dropout: float = 0.0
    he: bool = True
    raw_time: bool = False

    def __post_init__(self) -> None:
        require("tdq.interval.encoding", self.encoding, int, low=2, most=MOST_WIDTH)
        if self.encoding % 2:
            raise ValueError(f"tdq.interval.encoding={self.encoding}: must be even")
        require("tdq.interval.width", self.width, int, low=1, most=MOST_WIDTH)
        require("tdq.interval.layers", self.layers, int, low=1, most=MOST_LAYERS)
        require("tdq.interval.dropout", self.dropout, float, low=0, below=1)
        require("tdq.interval.he", self.he, bool)


class GeneratorBank(Bank):
    """The networks f of all quantizers, by quantizer name.

    Its state dict shows each network by itself, `<quantizer>.<layer>.weight` and `.bias`, and loads
    strictly.

    Args:
        names: of the quantizers; row i belongs to names[i].
        time: the network's time step.
        options: shape and start of the networks.
    """

    def __init__(self, names: Sequence[str], time: TimeContext, options: GeneratorOptions) -> None:
        super().__init__()
        self.names, self.time, self.options = list(names), time, options
        self.encoding, self.layers = options.encoding, options.layers

        codes = scaled_time(time.steps)
        if not options.raw_time:
            codes = encode_time(torch.arange(time.steps), options.encoding)

        # torch's default for nn.Linear, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); He for the last layer.
        sizes = [codes.shape[1], *[options.width] * (options.layers - 1), 1]
        for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            bound = fan_in**-0.5
            weight = torch.empty(len(names), fan_out, fan_in).uniform_(-bound, bound)
            bias = torch.empty(len(names), fan_out).uniform_(-bound, bound)
            self.register_parameter(f"weight{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias{layer}", nn.Parameter(bias))

        if options.he:
            nn.init.normal_(self.weights[-1], std=(2 / sizes[-2]) ** 0.5)

        self.encodings: Tensor
        self.register_buffer("encodings", codes, persistent=False)

        # What follows from the weights alone is computed once for each state of them.
        self._matrix_cache: Cache[Tensor] = Cache()
        self._rows_cache: Cache[tuple[Tensor, ...]] = Cache()
        self._table_cache: Cache[Tensor] = Cache()
        self._eval_cache: Cache[Tensor] = Cache()

    @property
    def weights(self) -> list[nn.Parameter]:
        """Stacked weights of every layer, `[Q, out, in]`."""
        return [getattr(self, f"weight{layer}") for layer in range(self.layers)]

    @property
    def biases(self) -> list[nn.Parameter]:
        """Stacked biases of every layer, `[Q, out]`."""
        return [getattr(self, f"bias{layer}") for layer in range(self.layers)]

    def start(self, row: int, rho: float) -> None:
        """Set the last bias of one network, so that its output spreads around softplus(rho)."""
        with torch.no_grad():
            self.biases[-1][row] = rho

    # --- Evaluation

    def generate(self, code: Tensor) -> Tensor:
        """Return s of every quantizer for the given encodings.

        Args:
            code: enc(t), `[B, d]`.

        Returns:
            `[Q, B]`, positive.
        """
        with torch.autocast(code.device.type, enabled=False):  # step sizes stay in single precision
            weights, biases = self.weights, self.biases

            # The input is the same for all: one product for the whole first layer.
            h = F.linear(code, weights[0].reshape(-1, code.shape[1]), biases[0].reshape(-1))
            h = h.reshape(len(code), *weights[0].shape[:2]).transpose(0, 1)

            for layer in range(1, self.layers):
                h = h.relu()
                if layer == self.layers - 1:
                    h = F.dropout(h, self.options.dropout, self.training)
                h = torch.baddbmm(biases[layer][:, None], h, weights[layer].transpose(1, 2))

            return F.softplus(h.squeeze(-1))

    def step_sizes(self) -> Tensor:
        """Return s of every quantizer at the current time step, for training.

        `[Q, B]`, or `[Q]` for a 0-dim t.
        It is computed once for each time step, and all quantizers share its graph.
        """
        if torch.compiler.is_compiling():
            # Weights don't change within compiled code, and their addresses are unknown there. What
            # was computed without gradients is of no use to a block that is computed again with.
            learns = torch.is_grad_enabled() and self.weights[0].requires_grad
            kept = self.time.kept
            if kept is None or kept[0] is not self or (learns and not kept[1].requires_grad):
                kept = self.time.kept = (self, self._matrix_now())
            return kept[1]
        return self._matrix_cache.get(self._now(), self._matrix_now)

    def row_in_training(self, row: int) -> Tensor:
        """Return one quantizer's row of `step_sizes`: 0-dim, or `[B]`.

        All rows are taken at once: on the way back their gradients are then stacked, where hundreds
        of single rows would each be padded to a whole matrix and added.
        """
        if torch.compiler.is_compiling():
            return self.step_sizes()[row]
        rows = self._rows_cache.get(self._now(), lambda: self.step_sizes().unbind())
        # A view for each call: gradients of one use are summed before those of another (the
        # penalty's), in an order that does not depend on which uses there are.
        return rows[row].view_as(rows[row])

    def _matrix_now(self) -> Tensor:
        t = self.time.t
        drawn = self.draws and not torch.compiler.is_compiling()
        same = same_draws(self, self.time, self.encodings.device) if drawn else nullcontext()
        with of_no_block(), same:
            # Not by plain indexing, which takes -1 for the last time step.
            rows = t.reshape(-1).to(self.encodings.device, torch.long)
            matrix = self.generate(self.encodings.index_select(0, rows))
        return matrix if t.dim() else matrix[:, 0]

    def row_now(self, row: int) -> Tensor:
        """Return one quantizer's s at the current time step, for eval: 0-dim, or `[B]`."""
        # The weights are looked at once for each time step, not for each quantizer.
        table = self._eval_cache.get((self.time.key, self._versions()), self.table)
        return at(table[row], self.time.t)  # which may lie elsewhere: samplers keep t on the CPU

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return s of every quantizer at every time step, `[Q, T]`, without dropout."""

        def compute() -> Tensor:
            training, self.training = self.training, False
            values = self.generate(self.encodings)
            self.training = training
            return values

        # Fused optimisers write without counting a version, so the weights' sums are looked at as
        # well.
        key = (self._versions(), tuple(_sum(p) for p in self.parameters()))
        return self._table_cache.get(key, compute)

    @property
    def draws(self) -> bool:
        """Return whether it draws random numbers: dropout, while training."""
        return self.training and self.options.dropout > 0

    def prepare(self, compiled: bool) -> None:
        """Compute all step sizes at the current time step: they belong to no block."""
        if compiled:
            self.time.kept = (self, self.step_sizes())
        else:
            self.row_in_training(0)

    def forget(self) -> None:
        """Drop what is kept for the current time step, with the graph of the last forward."""
        for cache in (self._matrix_cache, self._rows_cache, self._eval_cache):
            cache.clear()
        self.time.kept = None

    def _now(self) -> tuple[Any, ...]:
        """Return what the step sizes at the current time step depend on."""
        return self.time.key, torch.is_grad_enabled(), self.training, self._versions()

    def _versions(self) -> tuple[Any, ...]:
        return tuple((p.data_ptr(), p.dtype, p._version) for p in self.parameters())

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "DataParallel would leave TDQ's generators on one device: train with"
            " DistributedDataParallel, a process for each device"
        )

    # --- Parts

    def subset(self, rows: Sequence[int]) -> GeneratorBank:
        """Return a trainable copy of some networks, for the reconstruction of one block.

        `take_back` is the way back.
        """
        names = [self.names[row] for row in rows]
        # He's start is drawn and overwritten: other draws would follow if it were left out.
        part = GeneratorBank(names, self.time, replace(self.options, he=True))
        part.to(self.encodings.device)

        with torch.no_grad():
            for mine, theirs in zip(part.parameters(), self.parameters(), strict=True):
                mine.copy_(theirs[list(rows)])
        return part

    @torch.no_grad()
    def take_back(self, part: Bank) -> None:
        """Copy the networks of a `subset` back to the rows of the same names."""
        assert isinstance(part, GeneratorBank)
        rows = [self.names.index(name) for name in part.names]
        for mine, theirs in zip(self.parameters(), part.parameters(), strict=True):
            mine[rows] = theirs

    # --- State dict: a network at a time

    def _entries(self, prefix: str) -> Iterator[tuple[str, int, nn.Parameter]]:
        """Yield (key, row, stacked parameter) of every entry of the state dict."""
        layers = list(zip(self.weights, self.biases, strict=True))
        for row, name in enumerate(self.names):
            for layer, (weight, bias) in enumerate(layers):
                yield f"{prefix}{name}.{layer}.weight", row, weight
                yield f"{prefix}{name}.{layer}.bias", row, bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, row, stack in self._entries(prefix):
            destination[key] = stack[row] if keep_vars else stack.detach()[row]

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
        known = set()
        for key, row, stack in self._entries(prefix):
            known.add(key)
            if key not in state_dict:
                missing_keys.append(key)
                continue

            found, expected = tuple(state_dict[key].shape), tuple(stack.shape[1:])
            if found != expected:
                error_msgs.append(f"{key}: {found}, expected {expected}")
                continue

            with torch.no_grad():
                stack[row].copy_(state_dict[key])

        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key not in known
        ]


def _sum(p: Tensor) -> float:
    """Return the sum in double precision.

    A piece at a time: a double copy for every call fragments the heap by gigabytes.
    """
    return sum(float(piece.double().sum()) for piece in p.detach().flatten().split(1 << 16))


class Temporal(Interval):
    """TDQ's step size, s(t) = softplus(f(enc(t))): one quantizer's row of the network's bank.

    Args:
        bank: the networks f of all quantizers.
        row: which one is this quantizer's.
        calibrated: whether calibration sets the start value.
    """

    time_dependent = True
    fitted_over_time = True

    def __init__(self, bank: GeneratorBank, row: int, calibrated: bool = True) -> None:
        super().__init__()
        self.calibrated = calibrated
        self._bank = (bank,)  # in a tuple: the network's root owns the bank, not this module
        self.row = row

    @property
    def bank(self) -> GeneratorBank:
        """The bank that this interval reads."""
        return self._bank[0]

    def reading(self, bank: Bank, row: int) -> Temporal:
        """Return an interval that reads a row of a part of the bank."""
        assert isinstance(bank, GeneratorBank)
        return Temporal(bank, row)

    def start(self, s: float) -> None:
        """Let s(t) spread around s, unless the interval keeps its random start."""
        if self.calibrated:
            self.bank.start(self.row, inverse_softplus(s))

    def step_size(self) -> Tensor:
        """Return s at the current time step, 0-dim or `[B]`.

        In eval it is the table's, and who trains a network in that mode gets f's gradient, too.
        """
        if self.bank.training:
            return self.bank.row_in_training(self.row)
        s = self.bank.row_now(self.row)
        if torch.is_grad_enabled():
            return pass_straight_through(self.bank.row_in_training(self.row), s)
        return s

    def table(self) -> Tensor:
        """Return s for every time step, `[T]`."""
        return self.bank.table()[self.row]


@dataclass(frozen=True)
class TemporalIntervals(GeneratorOptions, Intervals):
    """Give every activation quantizer a network f of its own: TDQ.

    Args:
        calibrated: whether s(t) starts around what calibration found, or at random.
    """

    calibrated: bool = True

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[list[Interval], GeneratorBank]:
        """Return one interval for each name, and the bank that they read."""
        bank = GeneratorBank(names, time, self)
        return [Temporal(bank, row, self.calibrated) for row in range(len(names))], bank
