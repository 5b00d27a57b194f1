"""From a float network to a quantized one with start values: what quantization-aware training and PTQ both begin with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Stream, fixed_draws
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.ptq.calibration_set import CalibrationSet
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track

BATCH = 64


@dataclass(frozen=True)
class Shown:
    """What a network is shown, batch by batch.

    Args:
        samples: how many.
        get: (x_t, t) of a batch of `BATCH`, on the CPU; the last may be smaller.
    """

    samples: int
    get: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def batches(self) -> int:
        return -(-self.samples // BATCH)


def drawn(model: DiffusionModel, images: Samples, samples: int, seed: int) -> Shown:
    """Training samples noised to t, stratified over all of time."""
    draws = fixed_draws(
        seed, Stream.CALIBRATION, samples=samples, images=len(images), shape=model.sample_shape, steps=model.steps,
        random=images.random,
    )  # fmt: skip

    def get(number: int) -> tuple[Tensor, Tensor]:
        part = draws.of(slice(number * BATCH, (number + 1) * BATCH))
        return model.schedule.add_noise(images.batch(part.index, part.flip, part.noise), part.eps, part.t), part.t

    return Shown(samples, get)


def of_set(samples: CalibrationSet) -> Shown:
    """A calibration set, in its order."""
    return Shown(len(samples), lambda n: samples.batch(slice(n * BATCH, (n + 1) * BATCH)))


@torch.no_grad()
def quantized_and_calibrated(
    net: nn.Module,
    model: DiffusionModel,
    recipe: Recipe,
    shown: Shown,
    *,
    seed: int,
    processes: Processes,
    cache: Path,
    key: files.Parts,
) -> nn.Module:
    """Quantizes a float network in place and sets the start value of every interval, once.

    Args:
        net: float, on the processes' device.
        recipe: the four slots.
        shown: (x_t, t) over all of time; at least 1,000 samples for a real fit.
        seed: of the generators' start.
        cache: folder in which start values are kept.
        key: what they depend on, for the cache.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        time = model.quantize(net, recipe)
    net.to(processes.device).eval()
    file = cache / "calibration" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}.json"
    found = processes.decide(lambda: files.read_json(file))
    if found is not None:
        calibrate.apply(net, {name: (s, z) for name, (s, z) in found.items()})
        return net
    with (
        calibrate.calibrating(net, shown.batches, recipe.habits.start) as calibration,
        track("calibrating", shown.batches, show=processes.main) as advance,
    ):
        calibration.gather = processes.gather_objects if processes.world > 1 else None
        for number in range(shown.batches):
            # Every process sees the first batch, so that even a process without another one has seen every tensor.
            if number and number % processes.world != processes.rank:
                continue
            calibration.batch = number
            show(net, model, shown, number, processes)
            advance("")
    time.set(None)
    processes.decide(lambda: files.write_json(file, calibration.found))
    return net


def show(net: nn.Module, model: DiffusionModel, shown: Shown, number: int, processes: Processes) -> Tensor:
    """One batch through the network."""
    x_t, t = (value.to(processes.device) for value in shown.get(number))
    return model.predict(net, x_t, t)
