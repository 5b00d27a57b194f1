"""Quantization-aware training of a calibrated network, with the gradients of its method.

Optimiser groups, AdamW as released: weights and biases; step sizes; zero points (a learning rate of their own, large
enough to move by whole codes); generators (with weight decay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.loop import History, Log, TrainOptions, train
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.intervals.temporal import GeneratorBank
from tdq_exp.quant.rules.nipq import Nipq
from tdq_exp.quant.rules.pact import Pact
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint
from tdq_exp.runtime.processes import Processes


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
    images: Samples,
    held_out: Samples,
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


def interval_tables(net: nn.Module) -> dict[str, Tensor]:
    """Step size over t of every activation quantizer, by name, on the CPU."""
    return {
        name: quantizer.tables()[0].cpu()
        for name, quantizer in activation_quantizers(net).items()
        if not quantizer.interval.dynamic
    }
