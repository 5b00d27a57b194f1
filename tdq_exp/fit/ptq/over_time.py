"""MinMax with TDQ, or a step size for each group of t: fitted to each tensor's error over t.

    L = sum over quantizers of  mean (x_hat(t) - x)^2 / mean x^2

x are random values of each tensor in the float network, kept with the t of their sample.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import BareSeed, Stream, bare_generator, generator, seed_global
from tdq_exp.fit.calibrated import forward_batch, set_batches
from tdq_exp.fit.checkpoint import save_state
from tdq_exp.fit.options import ReconstructOptions, cosine
from tdq_exp.fit.ptq.blocks import Block
from tdq_exp.fit.ptq.part_file import put_back, read_part, state_of
from tdq_exp.fit.ptq.reconstruct import rates_of_block, trainable
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.fit.qat import optimizer_groups
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.progress import track
from tdq_exp.runtime.tensor_files import values_of

VALUES = 256  # of each tensor and sample


@dataclass
class Values:
    """Keeps random values of every sample that passes a quantizer.

    Args:
        seen: by number of the batch, `[B, VALUES]`.
    """

    batch: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        rows = x.detach().float().flatten(1)
        g = bare_generator(BareSeed.OVER_TIME_VALUES, self.batch)
        pick = torch.randint(rows.shape[1], (VALUES,), generator=g)
        self.seen[self.batch] = rows[:, pick.to(rows.device)].cpu()

    def all(self) -> Tensor:
        """Return `[N, VALUES]`, in the order of the batches."""
        return torch.cat([self.seen[number] for number in sorted(self.seen)])


@contextmanager
def observed(quantizers: Mapping[str, Quantizer]) -> Iterator[dict[str, Values]]:
    """Let quantizers pass everything within the `with` block, and keep random values of it."""
    observers = {name: Values() for name in quantizers}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        yield observers
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


def fitted_over_time(net: nn.Module) -> bool:
    """Return whether a network has step sizes that are functions of t to be fitted."""
    return any(q.interval.fitted_over_time for q in activation_quantizers(net).values())


def make_over_time(
    net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    options: ReconstructOptions,
    context: RunContext,
) -> dict[str, float]:
    """Fit a calibrated network over time, or take the fit from its file; return errors and seconds.

    Values are gathered by all processes; each then makes the same fit, and the main one's counts.

    Args:
        net: quantized and calibrated; fitted in place.
        model: its description.
        samples: the calibration set.
        options: updates, batch size and rates.
        context: of the run.
    """
    everything = Block("over_time", activation_quantizers(net))
    file = context.folder / "over_time.pt"

    found = read_part(file, context)
    if found is None:
        began = clock.monotonic()
        values = _observe(net, model, samples, everything.quantizers, context)
        time: TimeContext = net.time  # type: ignore[assignment]

        before, after = fit_over_time(
            everything.quantizers,
            values,
            samples.times(),
            time,
            options,
            context.seed,
            context.processes.device,
            context.processes.main,
        )

        report = {"before": before, "after": after, "seconds": clock.monotonic() - began}
        state = state_of(net, everything)
        made = {"fingerprint": context.fingerprint, "report": report, **state}
        context.processes.decide(partial(save_state, file, made))
        found = read_part(file, context)  # what every process goes on with

    if found is None:
        raise FileNotFoundError(f"{file}: was written and is gone; run the same command again")

    with values_of(file):
        put_back(net, everything, found)
        report = {key: float(found["report"][key]) for key in ("before", "after", "seconds")}
    if context.log is not None:
        context.log({f"over_time/{key}": value for key, value in report.items()}, 1)
    return report


@torch.no_grad()
def _observe(
    net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    quantizers: Mapping[str, Quantizer],
    context: RunContext,
) -> dict[str, Tensor]:
    """Return random values of every tensor in the float network, `[N, VALUES]`, by quantizer."""
    processes, batches = context.processes, set_batches(samples)

    # Each process looks at its share of the batches; then all know all.
    with (
        observed(quantizers) as observers,
        track("looking", len(batches), show=processes.main) as advance,
    ):
        for number in range(len(batches)):
            if number % processes.world == processes.rank:
                for observer in observers.values():
                    observer.batch = number
                forward_batch(net, model, batches, number, processes)
            advance("")

    if processes.world > 1:
        for name, observer in observers.items():
            for other, seen in processes.gather_objects((name, observer.seen)):
                observers[other].seen.update(seen)

    return {name: observer.all() for name, observer in observers.items()}


def fit_over_time(
    quantizers: dict[str, Quantizer],
    values: dict[str, Tensor],
    t: Tensor,
    time: TimeContext,
    options: ReconstructOptions,
    seed: int,
    device: torch.device,
    show: bool = True,
) -> tuple[float, float]:
    """Train step sizes over t and zero points, in place; return the error before and after.

    Args:
        quantizers: activation quantizers of one network, calibrated.
        values: of each, `[N, V]`.
        t: of each sample, `[N]`.
        time: the network's.
        options: updates, batch size and rates of Adam; the rates fall to zero along a cosine.
        seed: of the draws.
        device: of the network.
        show: whether to show progress.
    """

    # Relative errors, so that a tensor of large values does not outweigh the others.
    scale = {name: float(v.square().mean().clamp(min=1e-20)) for name, v in values.items()}

    def error(index: Tensor) -> Tensor:
        time.set(t[index].to(device))
        terms = []
        for name, quantizer in quantizers.items():
            x = values[name][index].to(device)
            terms.append((quantizer(x) - x).square().mean() / scale[name])
        return torch.stack(terms).mean()

    def mean_error() -> float:
        with torch.no_grad():
            parts = torch.arange(len(t)).split(1024)
            return sum(float(error(part)) * len(part) for part in parts) / len(t)

    seed_global(seed, Stream.OVER_TIME_NOISE)  # dropout of generators: the same in every process
    before, updates = mean_error(), options.updates

    # Adam, its rates falling to zero along a cosine.
    with (
        trainable(quantizers) as learned,
        track("fitting over time", updates, show=show) as advance,
    ):
        groups = optimizer_groups(learned, rates_of_block(options))
        optimizer = torch.optim.Adam(groups, fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]

        for update in range(updates):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(update, updates)

            g = generator(seed, Stream.OVER_TIME_BATCH, update)
            loss = error(torch.randint(len(t), (options.batch_size,), generator=g))

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
            optimizer.step()
            advance(f"error {float(loss.detach()):.4f}")

    return before, mean_error()
