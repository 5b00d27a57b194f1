"""From a float network to a quantized one with start values: where QAT and PTQ both begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import BareSeed, Draws, Stream, fixed_draws, seed_global_bare
from tdq_exp.diffusion.objective import NetworkInput, Samples
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe
from tdq_exp.runtime import files
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, track

BATCH = 64


@dataclass(frozen=True)
class Batches:
    """Samples (x_t, t, condition), batch by batch.

    Args:
        samples: how many.
        get: number of a batch -> its `BATCH` samples, on the CPU; the last is smaller.
    """

    samples: int
    get: Callable[[int], NetworkInput]

    def __len__(self) -> int:
        return -(-self.samples // BATCH)


def drawn_batches(model: DiffusionModel, images: Samples, samples: int, seed: int) -> Batches:
    """Return training samples noised to t, stratified over all of time."""
    draws = fixed_draws(
        seed,
        Stream.CALIBRATION,
        samples=samples,
        images=len(images),
        shape=model.sample_shape,
        steps=model.steps,
        random=images.random,
    )

    def get(number: int) -> NetworkInput:
        return noised(model, images, draws.of(slice(number * BATCH, (number + 1) * BATCH)))

    return Batches(samples, get)


def noised(model: DiffusionModel, images: Samples, draws: Draws) -> NetworkInput:
    """Return (x_t, t, condition) of some draws, on the CPU: x_t is the image noised to t."""
    x_0 = images.batch(draws.index, draws.flip, draws.noise)
    x_t = model.schedule.add_noise(x_0, draws.eps, draws.t)
    return NetworkInput(x_t, draws.t, images.condition(draws.index))


def set_batches(samples: CalibrationSet) -> Batches:
    """Return a calibration set, in its order."""
    return Batches(len(samples), lambda n: samples.batch(slice(n * BATCH, (n + 1) * BATCH)))


@torch.no_grad()
def calibrated(
    net: nn.Module,
    model: DiffusionModel,
    recipe: Recipe,
    batches: Batches,
    context: RunContext,
    key: files.Parts,
) -> nn.Module:
    """Quantize a float network in place and set the start value of every step size, once.

    Args:
        net: float, on the processes' device.
        model: its description.
        recipe: of the quantizers.
        batches: what it is shown, over all of time; at least 1,000 samples for a real fit.
        context: of the run; its seed is that of the generators' start.
        key: everything that the start values depend on; they are cached under it.
    """
    processes = context.processes

    # 1. Quantizers in place of the layers; TDQ's generators start from random weights.
    with torch.random.fork_rng(devices=[]):
        seed_global_bare(BareSeed.GENERATOR_START, context.seed)
        time = model.quantize(net, recipe)
    net.to(processes.device).eval()

    # 2. Start values that an earlier run found.
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    file = context.cache / "calibration" / f"{digest}.json"
    found = processes.decide(lambda: _cached(file))
    if found is not None:
        calibrate.apply(net, {name: (s, z) for name, (s, z) in found.items()})
        return net

    # 3. Else what every tensor's values say.
    with (
        calibrate.calibrating(net, len(batches), recipe.habits.start) as calibration,
        track("calibrating", len(batches), show=processes.main) as advance,
    ):
        calibration.gather = processes.gather_objects if processes.world > 1 else None
        for number in range(len(batches)):
            # Every process sees the first batch, so that it has seen every tensor.
            if number and number % processes.world != processes.rank:
                continue
            calibration.batch = number
            forward_batch(net, model, batches, number, processes)
            advance("")

    time.set(None)
    made = {"of": digest, "start": calibration.found}
    processes.decide(lambda: files.write_json(file, made))
    return net


def _cached(file: Path) -> dict[str, Any] | None:
    """Return cached start values; None if there are none, or (printing a line) if damaged."""
    try:
        found = files.read_json(file, must_be_sealed=True)
        if found is None:
            return None
        if "of" not in found or "start" not in found:
            raise ValueError(f"{file}: does not say whose it is, an earlier version wrote it")
        if found["of"] != file.stem:
            raise ValueError(f"{file}: damaged (holds start values of another network)")
        return dict(found["start"])
    except ValueError as error:
        console.print(f"{str(error).partition(';')[0]}: searched again")
        return None


def forward_batch(
    net: nn.Module, model: DiffusionModel, batches: Batches, number: int, processes: Processes
) -> Tensor:
    """Run one batch through the network and return its prediction."""
    x_t, t, condition = batches.get(number).to(processes.device)
    return model.predict(net, x_t, t, condition)
