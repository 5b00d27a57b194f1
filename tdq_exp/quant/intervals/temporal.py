"""TDQ's generators: one small network of t per quantizer, all evaluated at once.

    I(t)  = enc(t):  cos and sin of t 10000^(-2i/d), i < d/2 (cos first, as released)
    s~(t) = softplus(f(I)),  f: linear layers with ReLU between

All generators of a network have the same shape, so their weights are stacked, `[Q, out, in]`, and one batched product
per layer gives the whole `[Q, B]` matrix of step sizes; each quantizer reads its row. In eval the matrix is read from a
table over all T, made by the same function that baking calls: two ways of computing it would differ in the last bit,
and rounding would amplify that.

Source: So et al., *Temporal Dynamic Quantization for Diffusion Models*, NeurIPS 2023, section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant.intervals.base import Interval, inverse_softplus
from tdq_exp.quant.time import TimeContext

T_MAX = 10000.0


def encode_time(t: Tensor, width: int) -> Tensor:
    """Geometric Fourier encoding of the raw integer time step.

    Args:
        t: `[B]`, integer.
        width: d, even.

    Returns:
        `[B, d]`, float32: cos of the d/2 frequencies, then sin.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(T_MAX) / half))
    angle = t.double()[:, None] * frequencies.to(t.device)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def _sum(p: Tensor) -> float:
    """In double precision, a piece at a time: a double copy for every reading fragments the heap by gigabytes."""
    return sum(float(piece.double().sum()) for piece in p.detach().flatten().split(1 << 16))


class GeneratorBank(nn.Module):
    """The generators of a network, by quantizer name.

    Its state dict shows each generator by itself, `<quantizer>.<layer>.weight` and `.bias`, and loads strictly.

    Args:
        names: of the quantizers; row i belongs to names[i].
        time: the network's time step.
        encoding: d.
        width: of the hidden layers.
        layers: number of linear layers, at least 1.
        dropout: before the last layer, while training.
        he: He initialisation of the last layer; with it on all layers s(t) / s0 would spread over 0.2..5.6.
    """

    parameter_group = "generators"

    def __init__(
        self,
        names: Sequence[str],
        time: TimeContext,
        encoding: int = 128,
        width: int = 64,
        layers: int = 4,
        dropout: float = 0.0,
        he: bool = True,
    ) -> None:
        super().__init__()
        if encoding < 2 or encoding % 2 or layers < 1 or width < 1 or not 0 <= dropout < 1:
            raise ValueError("tdq.interval: encoding must be even, layers and width positive, dropout in [0, 1)")
        self.names, self.time, self.dropout, self.encoding = list(names), time, dropout, encoding
        sizes = [encoding, *[width] * (layers - 1), 1]
        self.layers = layers
        for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            bound = fan_in**-0.5  # torch's default for nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
            weight = torch.empty(len(names), fan_out, fan_in).uniform_(-bound, bound)
            bias = torch.empty(len(names), fan_out).uniform_(-bound, bound)
            self.register_parameter(f"weight{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias{layer}", nn.Parameter(bias))
        if he:
            nn.init.normal_(self.weights[-1], std=(2 / sizes[-2]) ** 0.5)
        self.encodings: Tensor
        self.register_buffer("encodings", encode_time(torch.arange(time.steps), encoding), persistent=False)
        self._kept: tuple[Any, Tensor] | None = None
        self._rows: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._table: tuple[Any, Tensor] | None = None
        self._read: tuple[Any, Tensor] | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """Stacked weights of every layer, `[Q, out, in]`."""
        return [self.get_parameter(f"weight{layer}") for layer in range(self.layers)]

    @property
    def biases(self) -> list[nn.Parameter]:
        """Stacked biases of every layer, `[Q, out]`."""
        return [self.get_parameter(f"bias{layer}") for layer in range(self.layers)]

    def start(self, row: int, rho: float) -> None:
        """Sets the last bias of a generator, so that its output spreads around softplus(rho)."""
        with torch.no_grad():
            self.biases[-1][row] = rho

    def generate(self, code: Tensor) -> Tensor:
        """s~ of every quantizer for the given encodings.

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
                    h = F.dropout(h, self.dropout, self.training)
                h = torch.baddbmm(biases[layer][:, None], h, weights[layer].transpose(1, 2))
            return F.softplus(h.squeeze(-1))

    def step_sizes(self) -> Tensor:
        """The matrix at the current time step, for training: `[Q, B]`, or `[Q]` for a 0-dim t. Computed once for it."""
        if torch.compiler.is_compiling():
            # Weights don't change within compiled code, and their addresses are unknown there.
            if self.time.kept is None or self.time.kept[0] is not self:
                self.time.kept = (self, self._matrix_now())
            return self.time.kept[1]
        key = (self.time.version, torch.is_grad_enabled(), self._versions())
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._matrix_now())
        return self._kept[1]

    def _matrix_now(self) -> Tensor:
        t = self.time.t
        matrix = self.generate(self.encodings[t.reshape(-1)])
        return matrix if t.dim() else matrix[:, 0]

    def row_now(self, row: int) -> Tensor:
        """One quantizer's entry of the table at the current time step, for eval: 0-dim, or `[B]`."""
        key = (self.time.version, self._versions())
        if (
            self._read is None or self._read[0] != key
        ):  # the weights are looked at once per time step, not per quantizer
            self._read = (key, self.table())
        t = self.time.t
        return self._read[1][row].index_select(0, t.reshape(-1)).reshape(t.shape)

    @torch.no_grad()
    def table(self) -> Tensor:
        """s~ of every quantizer at every time step, `[Q, T]`, without dropout; kept until a weight changes."""
        # Fused optimisers write without counting a version, so the weights' sums are looked at as well.
        key = (self._versions(), tuple(_sum(p) for p in self.parameters()))
        if self._table is None or self._table[0] != key:
            training = self.training
            self.training = False
            self._table = (key, self.generate(self.encodings))
            self.training = training
        return self._table[1]

    def row_in_training(self, row: int) -> Tensor:
        """One quantizer's row of `step_sizes`.

        All rows are taken at once: on the way back their gradients are then stacked, where hundreds of single rows
        would each be padded to a whole matrix and added.
        """
        matrix = self.step_sizes()
        if torch.compiler.is_compiling():
            return matrix[row]
        if self._rows is None or self._rows[0] is not matrix:
            self._rows = (matrix, matrix.unbind())
        return self._rows[1][row]

    def forget(self) -> None:
        """Drop what is kept for the current time step, and with it the graph of the last forward pass."""
        self._kept = self._read = self._rows = None

    def _versions(self) -> tuple[Any, ...]:
        return tuple((p.data_ptr(), p.dtype, p._version) for p in self.parameters())

    def subset(self, rows: Sequence[int]) -> GeneratorBank:
        """A trainable copy of some generators, for the reconstruction of one block; see `take_back`."""
        part = GeneratorBank(
            [self.names[row] for row in rows], self.time, self.encoding, self.weights[0].shape[1], self.layers,
            self.dropout,
        ).to(self.encodings.device)  # fmt: skip
        with torch.no_grad():
            for mine, theirs in zip(part.parameters(), self.parameters(), strict=True):
                mine.copy_(theirs[list(rows)])
        return part

    @torch.no_grad()
    def take_back(self, part: GeneratorBank) -> None:
        """Copies the generators of a `subset` back to the rows of the same names."""
        rows = [self.names.index(name) for name in part.names]
        for mine, theirs in zip(self.parameters(), part.parameters(), strict=True):
            mine[rows] = theirs

    def __deepcopy__(self, memo: dict[int, Any]) -> GeneratorBank:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        kept, self._kept, self._table, self._read, self._rows = self._kept, None, None, None, None
        try:  # the kept matrix belongs to this network's graph, which can't be copied
            twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        finally:
            self._kept = kept
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for row, name in enumerate(self.names):
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                for kind, stack in (("weight", weight), ("bias", bias)):
                    value = stack[row] if keep_vars else stack.detach()[row]
                    destination[f"{prefix}{name}.{layer}.{kind}"] = value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        known = set()
        for row, name in enumerate(self.names):
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                for kind, stack in (("weight", weight), ("bias", bias)):
                    key = f"{prefix}{name}.{layer}.{kind}"
                    known.add(key)
                    if key not in state_dict:
                        missing_keys.append(key)
                    elif state_dict[key].shape != stack.shape[1:]:
                        error_msgs.append(f"{key}: {tuple(state_dict[key].shape)}, expected {tuple(stack.shape[1:])}")
                    else:
                        with torch.no_grad():
                            stack[row].copy_(state_dict[key])
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]


class Temporal(Interval):
    """TDQ: s~(t) = f(enc(t)); this quantizer's row of the network's bank of generators.

    Args:
        bank: all generators of the network.
        row: which one is this quantizer's.
    """

    timed = True

    def __init__(self, bank: GeneratorBank, row: int) -> None:
        super().__init__()
        self._bank = (bank,)  # in a tuple: the network's root owns the bank, not this module
        self.row = row

    @property
    def bank(self) -> GeneratorBank:
        return self._bank[0]

    def start(self, s: float) -> None:
        self.bank.start(self.row, inverse_softplus(s))

    def forward(self, x: Tensor | None = None) -> Tensor:
        if self.bank.training:
            return self.bank.row_in_training(self.row)
        return self.bank.row_now(self.row)

    def table(self) -> Tensor:
        return self.bank.table()[self.row]


class TemporalIntervals:
    """Gives every activation quantizer a generator of its own: TDQ.

    Args:
        encoding: d, width of enc(t).
        width: of the hidden layers of f.
        layers: linear layers of f; the paper finds quality stable from 4 on.
        dropout: before the last layer, while training (release: 0.2).
        he: He initialisation of the last layer (the paper), or torch's default everywhere (release).
    """

    def __init__(self, encoding: int, width: int = 64, layers: int = 4, dropout: float = 0.0, he: bool = True) -> None:
        self.options = {"encoding": encoding, "width": width, "layers": layers, "dropout": dropout, "he": he}

    def make(self, names: Sequence[str], time: TimeContext, raw: bool = False) -> tuple[list[Interval], GeneratorBank]:
        """One interval for each name, and the bank that they read."""
        bank = GeneratorBank(names, time, **self.options)  # type: ignore[arg-type]
        return [Temporal(bank, row) for row in range(len(names))], bank
