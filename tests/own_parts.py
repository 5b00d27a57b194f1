"""An interval and a rule as a user of the package would write them, named by `_target_`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant import Bank, Interval, Intervals, Lsq
from tdq_exp.quant.intervals.base import inverse_softplus
from tdq_exp.quant.time import TimeContext


class HarmonicBank(Bank):
    """Coefficients of every quantizer's s(t) = softplus(a + b cos(2 pi t / T) + c sin(2 pi t / T)).

    Args:
        quantizers: how many there are.
        time: the network's time step.
    """

    def __init__(self, quantizers: int, time: TimeContext) -> None:
        super().__init__()
        self.time = time
        self.coefficients = nn.Parameter(torch.zeros(quantizers, 3))
        angle = 2 * math.pi * torch.arange(time.steps) / time.steps
        waves = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()])
        self.waves: Tensor
        self.register_buffer("waves", waves, persistent=False)

    def subset(self, rows: Sequence[int]) -> HarmonicBank:
        part = HarmonicBank(len(rows), self.time).to(self.waves.device)
        part.rows = list(rows)
        with torch.no_grad():
            part.coefficients.copy_(self.coefficients[part.rows])
        return part

    def take_back(self, part: HarmonicBank) -> None:
        with torch.no_grad():
            self.coefficients[part.rows] = part.coefficients


class Harmonic(Interval):
    """One quantizer's row of a `HarmonicBank`."""

    time_dependent = True

    def __init__(self, bank: HarmonicBank, row: int) -> None:
        super().__init__()
        self._bank, self.row = (bank,), row

    @property
    def bank(self) -> HarmonicBank:
        return self._bank[0]

    def reading(self, bank: HarmonicBank, row: int) -> Harmonic:
        return Harmonic(bank, row)

    def start(self, s: float) -> None:
        with torch.no_grad():
            self.bank.coefficients[self.row] = torch.tensor([inverse_softplus(s), 0.0, 0.0])

    def step_size(self) -> Tensor:
        """The gather and the sum are those of `table`, so that baked steps have the same bits."""
        t = self.bank.time.t
        table = F.softplus((self.bank.coefficients[self.row, :, None] * self.bank.waves).sum(0))
        return table[t.reshape(-1)].reshape(t.shape)

    def table(self) -> Tensor:
        with torch.no_grad():
            return F.softplus((self.bank.coefficients[self.row, :, None] * self.bank.waves).sum(0))


class HarmonicIntervals(Intervals):
    """Gives every activation quantizer a `Harmonic` interval."""

    def make(
        self, names: Sequence[str], time: TimeContext, raw: bool = False
    ) -> tuple[list[Interval], Bank]:
        bank = HarmonicBank(len(names), time)
        return [Harmonic(bank, row) for row in range(len(names))], bank


class PowerOfTwo(Lsq):
    """LSQ whose step sizes are powers of two."""

    def transform_step(self, s: Tensor) -> Tensor:
        return s + (torch.exp2(torch.log2(s).round()) - s).detach()
