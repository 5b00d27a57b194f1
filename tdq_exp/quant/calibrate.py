"""Calibration: start values for every interval, from the float network's own tensors.

    with calibrating(net) as calibration:
        for number, (x_t, t) in enumerate(batches):     # drawn over all of time
            calibration.batch = number
            net(x_t, t)

Inside of the block quantizers pass everything through and keep a random sample of what they see; at
its end each gets the (s, z) of least squared error, or the one that its rule asks for. Those whose
step size is read from the tensor have no start values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import SILU_MINIMUM

FEW = 15  # codes up to which every zero point is tried
KEPT = 32768  # values per tensor: the error of a step size is then known to about half a percent


class Seen(NamedTuple):
    """What one batch held: values that were kept of it, and numbers of all of it."""

    values: Tensor
    samples: int
    low: float
    high: float
    mean: float  # over its samples, each of which has one
    deviation: float


@dataclass
class Observer:
    """What one quantizer saw: a random sample of values per batch, and its extremes and moments.

    Args:
        calibration: says which batch is running.
        fixed: a weight: the same in every batch, so one look is enough.
    """

    calibration: Calibration
    fixed: bool
    seen: dict[int, Seen] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """Keep a random sample of a tensor, its extremes and its moments."""
        number = 0 if self.fixed else self.calibration.batch
        if number in self.seen:
            return

        flat = x.detach().float().reshape(-1)
        count = KEPT if self.fixed else max(KEPT // self.calibration.batches, 1)
        if flat.numel() > count:
            # By the number of the batch alone (`diffusion.draws.BareSeed.CALIBRATION_VALUES`).
            pick = torch.randint(
                flat.numel(), (count,), generator=torch.Generator().manual_seed(number)
            )
            values = flat[pick.to(flat.device)].cpu()
        else:
            values = flat.cpu()

        rows = flat[None] if self.fixed else x.detach().float().reshape(len(x), -1)
        mean, std = rows.mean(1).mean(), rows.std(1).mean()
        low, high = float(flat.min()), float(flat.max())
        self.seen[number] = Seen(values, len(rows), low, high, float(mean), float(std))

    def values(self) -> Tensor:
        """Return the kept values in the order of the batches, equally many for each sample.

        A smaller batch, such as the last one, keeps as many values as the others, of which only
        its share is returned.
        """
        batches = [self.seen[number] for number in sorted(self.seen)]
        most = max(batches, key=lambda batch: batch.samples)
        found = []
        for values, samples, *_ in batches:
            wanted = -(-len(most.values) * samples // most.samples)
            if wanted < len(values):
                values = values[torch.linspace(0, len(values) - 1, wanted).long()]
            found.append(values)
        return torch.cat(found)

    def extremes(self) -> tuple[float, float]:
        """Return (smallest, largest) of everything seen."""
        batches = self.seen.values()
        return min(batch.low for batch in batches), max(batch.high for batch in batches)

    def moments(self) -> tuple[float, float]:
        """Return (mean, standard deviation), each averaged over samples, as the release does."""
        batches = self.seen.values()
        count = sum(batch.samples for batch in batches)
        means = sum(batch.mean * batch.samples for batch in batches)
        deviations = sum(batch.deviation * batch.samples for batch in batches)
        return means / count, deviations / count


@dataclass
class Calibration:
    """A calibration under way.

    Args:
        batches: how many will be shown, over all processes.
        batch: number of the one that is running; set it before each forward.
        gather: collects an object from every process, if the batches are shared out.
        found: afterwards, (s, z) by quantizer name.
    """

    batches: int
    batch: int = 0
    gather: Callable[[Any], list[Any]] | None = None
    found: dict[str, tuple[float, int]] = field(default_factory=dict)


@contextmanager
def calibrating(net: nn.Module, batches: int, start: str = "error") -> Iterator[Calibration]:
    """Collect what quantizers see within the block, and set their start values at its end.

    On an error inside of the block nothing is set.

    Args:
        net: a quantized network, in eval mode.
        batches: how many batches will be shown.
        start: `error`, or `moments` (the release's formulas).

    Raises:
        ValueError: if a quantizer saw nothing.
    """
    calibration = Calibration(batches)
    quantizers = _quantizers(net)
    observers = {
        name: Observer(calibration, fixed=quantizer.fixed) for name, quantizer in quantizers.items()
    }
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]

    # The caller shows the network its batches.
    try:
        yield calibration
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None

    # What all processes saw decides the start values.
    for name, quantizer in quantizers.items():
        observer = observers[name]
        if calibration.gather is not None:
            for seen in calibration.gather(observer.seen):
                observer.seen.update(seen)
        if not observer.seen:
            raise ValueError(f"{name} saw nothing during calibration: the network does not use it")
        calibration.found[name] = start_value(quantizer, observer, start)

    apply(net, calibration.found)


def apply(net: nn.Module, found: dict[str, tuple[float, int]]) -> None:
    """Set the start values of a calibration, from `Calibration.found` or a cache of it.

    Raises:
        KeyError: if the names are not those of the network's quantizers.
    """
    quantizers = _quantizers(net)
    if quantizers.keys() != found.keys():
        different = sorted(quantizers.keys() ^ found.keys())
        raise KeyError(f"calibration of another network: {different[:3]}")
    for name, quantizer in quantizers.items():
        s, z = found[name]
        quantizer.start(s, z)


def _quantizers(net: nn.Module) -> dict[str, Quantizer]:
    return {n: module for n, module in net.named_modules() if isinstance(module, Quantizer)}


def start_value(quantizer: Quantizer, observer: Observer, start: str) -> tuple[float, int]:
    """Return (s, z) for a quantizer.

    Args:
        quantizer: its rule may ask for something else than `start`.
        observer: what it saw.
        start: `error` or `moments`.
    """
    grid = quantizer.grid
    if quantizer.interval.dynamic:
        return 1.0, 0  # s and z follow the tensor

    low, high = observer.extremes()

    if quantizer.start_by == "range":
        return _range_start(low, high, grid)
    if quantizer.start_by == "max" or (start == "moments" and observer.fixed):
        return max(abs(low), abs(high), 1e-8) / grid.p, 0
    if start == "moments":
        bounded = quantizer.zero_point is not None and quantizer.zero_point.bounded_below
        return _moments_start(*observer.moments(), grid, bounded)
    return least_error(observer.values(), grid, low, high)


def _range_start(low: float, high: float, grid: Grid) -> tuple[float, int]:
    s, z = ops.affine_range(torch.tensor(low), torch.tensor(high), grid.n, grid.p)
    return float(s), int(z)


def _moments_start(mean: float, std: float, grid: Grid, bounded: bool) -> tuple[float, int]:
    """Return the release's (s, z): from the mean and the standard deviation."""
    if bounded:  # the output of a SiLU
        s = max((mean + 16 * std) / grid.p, 1e-8)
        return s, round(-SILU_MINIMUM / s)
    if grid.symmetric:
        return max((mean + 3 * std) / grid.p, 1e-8), 0
    half = grid.p / 2  # an affine grid shares its codes between both signs
    return max((mean + 3 * std) / half, 1e-8), round(half)


def least_error(values: Tensor, grid: Grid, low: float, high: float) -> tuple[float, int]:
    """Return the (s, z) that minimises `mean (x_hat - x)^2`, by search.

    Symmetric: 100 fractions of max|x| / p, then 20 around the best.

    Affine with few codes: every zero point is tried. Affine with many: the range [low, high],
    widened to hold 0, is shrunk one side at a time, twice over 50 fractions, then finely;
    z = round(-low / s).

    Args:
        values: a sample of the tensor, `[N]`.
        grid: of the quantizer.
        low, high: the tensor's extremes.
    """

    # Symmetric: one step size, searched coarsely, then near the best.
    if grid.symmetric:
        top = max(abs(low), abs(high), 1e-8) / grid.p
        zero = torch.zeros(())

        def best(fractions: Tensor) -> float:
            steps = top * fractions
            return float(fractions[_errors(values, steps, zero.expand(len(steps)), grid).argmin()])

        around = best(torch.linspace(0.01, 1, 100))
        return top * best((around + torch.linspace(-0.01, 0.01, 21)).clamp(min=1e-3)), 0

    # Affine: a range that holds 0.
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-8:
        return 1e-8, grid.n
    if grid.p <= FEW:
        return _every_zero_point(values, grid, low, high)

    a = b = 1.0  # kept fractions of the lower and of the upper side

    def search(side: str, fractions: Tensor) -> float:
        lows = low * (fractions if side == "low" else torch.full_like(fractions, a))
        highs = high * (fractions if side == "high" else torch.full_like(fractions, b))
        steps, zeros = ops.affine_range(lows, highs, grid.n, grid.p)
        return float(fractions[_errors(values, steps, zeros, grid).argmin()])

    # Either side in turn, the other one fixed; then both once more, finely.
    coarse = torch.linspace(0.02, 1, 50)
    for _ in range(2):
        b = search("high", coarse)
        a = search("low", coarse)

    fine = torch.linspace(-0.02, 0.02, 17)
    b = search("high", (b + fine).clamp(1e-3, 1.02))
    a = search("low", (a + fine).clamp(1e-3, 1.02))

    lows, highs = torch.tensor([low * a]), torch.tensor([high * b])
    steps, zeros = ops.affine_range(lows, highs, grid.n, grid.p)
    return float(steps), int(zeros)


def _every_zero_point(values: Tensor, grid: Grid, low: float, high: float) -> tuple[float, int]:
    """Return the (s, z) of least squared error on a grid with few codes.

    The error has a valley for each zero point, so each is searched: 40 steps, then 20 around
    the best.
    """
    zeros = torch.arange(grid.p + 1, dtype=torch.float32)
    # The largest step worth trying reaches both extremes.
    top = torch.maximum(-low / zeros.clamp(min=0.5), high / (grid.p - zeros).clamp(min=0.5))

    def best(fractions: Tensor, zeros: Tensor, top: Tensor) -> tuple[float, float, float]:
        steps = (top[:, None] * fractions).reshape(-1)
        tried = zeros.repeat_interleave(len(fractions))
        found = int(_errors(values, steps, tried, grid).argmin())
        return float(steps[found]), float(tried[found]), float(fractions[found % len(fractions)])

    s, z, fraction = best(torch.linspace(0.025, 1, 40), zeros, top)
    fine = (fraction + torch.linspace(-0.025, 0.025, 21)).clamp(min=1e-3)
    s, z, _ = best(fine, torch.tensor([z]), torch.tensor([s / fraction]))
    return s, int(z)


def _errors(values: Tensor, steps: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """Return the mean squared error of each candidate (s, z)."""
    errors = []
    for s, z in zip(steps, zeros.tolist(), strict=True):  # one at a time: they stay in the cache
        v = values / s
        v.clamp_(grid.n - z, grid.p - z).round_().mul_(s).sub_(values)
        errors.append(torch.dot(v, v))
    return torch.stack(errors)
