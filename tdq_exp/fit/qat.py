"""Quantization-aware training: quantize, calibrate, train with the method's gradients.

Optimiser groups, AdamW as released: weights and biases; step sizes; zero points (a learning rate of their own, large
enough to move by whole codes); generators (with weight decay).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp import record
from tdq_exp.data.images import Images
from tdq_exp.diffusion.objective import fixed_draws
from tdq_exp.fit.loop import History, Log, TrainOptions, train
from tdq_exp.models.model import DiffusionModel
from tdq_exp.processes import Processes
from tdq_exp.progress import track
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe, activation_quantizers, quantize
from tdq_exp.quant.generators import GeneratorBank
from tdq_exp.quant.nipq import Nipq
from tdq_exp.quant.pact import Pact
from tdq_exp.quant.quantizer import LowerBound, ZeroPoint

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Rates:
    """Learning rates after warm-up, and weight decays.

    Args:
        weights: of weights, biases and norms.
        decay: weight decay of the weights.
        step_size: of rho (static and per-step intervals, and the weights' steps) and of lower bounds.
        zero_point: of zeta: the share of the grid that one update can move.
        generator: of TDQ's generators.
        generator_decay: their weight decay.
    """

    weights: float
    decay: float
    step_size: float
    zero_point: float
    generator: float
    generator_decay: float


def qat(
    net: nn.Module,
    model: DiffusionModel,
    images: Images,
    held_out: Images,
    options: TrainOptions,
    rates: Rates,
    *,
    real_rounding: float,
    seed: int,
    folder: Path,
    mark: str,
    processes: Processes,
    log: Log | None = None,
) -> tuple[nn.Module, History]:
    """Trains a calibrated network; returns the average of its weights, and the history.

    Args:
        net: quantized and calibrated, on the processes' device.
        rates: of the optimiser groups.
        real_rounding: NIPQ's last share of the updates without noise. The rest as in `loop.train`.
    """
    optimizer = torch.optim.AdamW(optimizer_groups(net, rates), fused=True)  # hundreds of scalars, one pass
    noisy = [module for module in net.modules() if isinstance(module, Nipq)]
    first_real = round(options.updates * (1 - real_rounding))

    def phase(update: int) -> None:
        for quantizer in noisy:
            quantizer.noisy = update < first_real

    return train(
        net, model, images, held_out, optimizer, options, seed=seed, folder=folder, mark=mark, processes=processes,
        penalty=clipping_penalty(net), on_update=phase if noisy else None, log=log,
    )  # fmt: skip


def clipping_penalty(net: nn.Module) -> Callable[[], Tensor] | None:
    """The sum of PACT's penalties, or None where no quantizer has one."""
    clipped = [module for module in net.modules() if isinstance(module, Pact) and module.decay]
    if not clipped:
        return None
    return lambda: torch.stack([quantizer.penalty() for quantizer in clipped]).sum()


def optimizer_groups(net: nn.Module, rates: Rates) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one named group; empty groups are left out."""
    kinds: dict[str, list[nn.Parameter]] = {"weights": [], "step_sizes": [], "zero_points": [], "generators": []}
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, GeneratorBank):
                kinds["generators"].append(parameter)
            elif isinstance(module, ZeroPoint):
                kinds["zero_points"].append(parameter)
            elif isinstance(module, LowerBound) or hasattr(module, "rho"):
                kinds["step_sizes"].append(parameter)
            else:
                kinds["weights"].append(parameter)
    numbers = {
        "weights": (rates.weights, rates.decay), "step_sizes": (rates.step_size, 0.0),
        "zero_points": (rates.zero_point, 0.0), "generators": (rates.generator, rates.generator_decay),
    }  # fmt: skip
    return [
        {"name": kind, "params": parameters, "lr": numbers[kind][0], "weight_decay": numbers[kind][1]}
        for kind, parameters in kinds.items()
        if parameters
    ]


@torch.no_grad()
def quantized_and_calibrated(
    net: nn.Module,
    model: DiffusionModel,
    recipe: Recipe,
    images: Images,
    *,
    samples: int,
    seed: int,
    processes: Processes,
    cache: Path,
    key: record.Parts,
) -> nn.Module:
    """Quantizes a float network in place and sets the start value of every interval, once.

    Args:
        net: float, on the processes' device.
        recipe: the four slots.
        images: noised to x_t for t stratified over all of time.
        samples: number of (x_t, t); at least 1,000 for a real fit.
        seed: of the draws, and of the generators' start.
        cache: folder in which start values are kept.
        key: what they depend on, for the cache.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        time = quantize(net, model.roles(net), recipe, model.schedule.steps)
    net.to(processes.device).eval()
    file = cache / "calibration" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}.json"
    found = processes.decide(lambda: record.read(file))
    if found is not None:
        calibrate.apply(net, {name: (s, z) for name, (s, z) in found.items()})
        return net
    draws = fixed_draws(
        seed + 2, samples=samples, images=len(images), shape=model.sample_shape, steps=model.schedule.steps
    )
    starts = range(0, samples, CALIBRATION_BATCH)
    with (
        calibrate.calibrating(net, len(starts), recipe.habits.start) as calibration,
        track("calibrating", len(starts), show=processes.main) as advance,
    ):
        calibration.gather = processes.gather_objects if processes.world > 1 else None
        for number, start in enumerate(starts):
            # Every process sees the first batch, so that even a process without another one has seen every tensor.
            if number and number % processes.world != processes.rank:
                continue
            part = slice(start, start + CALIBRATION_BATCH)
            t = draws.t[part].to(processes.device)
            x_0 = model.encode(images.batch(draws.index[part], draws.flip[part]).to(processes.device))
            calibration.batch = number
            model.predict(net, model.schedule.add_noise(x_0, draws.eps[part].to(processes.device), t), t)
            advance("")
    time.set(None)
    processes.decide(lambda: record.write(file, calibration.found))
    return net


def interval_tables(net: nn.Module) -> dict[str, Tensor]:
    """Step size over t of every activation quantizer, by name, on the CPU."""
    return {name: quantizer.tables()[0].cpu() for name, quantizer in activation_quantizers(net).items()}
