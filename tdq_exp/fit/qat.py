"""Quantization-aware training of a calibrated network, with the gradients of its method.

Optimiser groups, AdamW as released: weights and biases; step sizes; zero points (a learning rate of their own, large
enough to move by whole codes); generators (with weight decay).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.loop import History, Log, TrainOptions, train
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.training import parameter_groups, penalty, set_final_phase
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
    first_real = round(options.updates * (1 - real_rounding))

    def phase(update: int) -> None:
        set_final_phase(net, update >= first_real)

    return train(
        net, model, images, held_out, optimizer, options, seed=seed, folder=folder, mark=mark, processes=processes,
        penalty=partial(penalty, net), on_update=phase, log=log,
    )  # fmt: skip


def optimizer_groups(net: nn.Module, rates: Rates) -> list[dict[str, object]]:
    """Every trainable parameter in exactly one named group; empty groups are left out."""
    numbers = {
        "weights": (rates.weights, rates.decay), "step_sizes": (rates.step_size, 0.0),
        "zero_points": (rates.zero_point, 0.0), "generators": (rates.generator, rates.generator_decay),
    }  # fmt: skip
    return [
        {"name": kind, "params": parameters, "lr": numbers[kind][0], "weight_decay": numbers[kind][1]}
        for kind, parameters in parameter_groups(net).items()
        if parameters
    ]


def interval_tables(net: nn.Module) -> dict[str, Tensor]:
    """Step size over t of every activation quantizer, by name, on the CPU."""
    tables = {name: q.tables() for name, q in activation_quantizers(net).items()}
    return {name: table[0].cpu() for name, table in tables.items() if table is not None}
