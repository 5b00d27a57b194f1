"""Quantization-aware training of a calibrated network, with the gradients of its method.

Optimiser groups, AdamW as released: weights and biases; step sizes; zero points (a learning rate of
their own, large enough to move by whole codes); generators (with weight decay).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import require_batch
from tdq_exp.fit.calibrated import drawn_batches
from tdq_exp.fit.correction import IMAGES, TIME_STEPS, NoisedImages, correct
from tdq_exp.fit.fit import Subject, Work
from tdq_exp.fit.loop import Training, TrainingSets
from tdq_exp.fit.options import QatOptions
from tdq_exp.fit.quantized import QuantizedFit
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant import parameter_groups, penalty, set_final_phase
from tdq_exp.runtime.context import RunContext

STEP = 5  # forward passes of the float network that one training step takes


class Qat(QuantizedFit[QatOptions]):
    """Trains weights and quantizers together."""

    def run(
        self, context: RunContext, net: nn.Module | None, subject: Subject
    ) -> tuple[nn.Module, dict[str, Any]]:
        if net is None:
            raise ValueError("model.weights has no value: quantization starts from a float network")

        options, model, data = self.options, subject.model, subject.data
        sets = TrainingSets(
            subject.samples(model, data.train, context, mirror=True),
            subject.samples(model, data.held_out, context),
        )

        # 1. Start values from training samples over all of time.
        float_net = copy.deepcopy(net) if options.corrects else None
        count = options.calibration_samples
        batches = drawn_batches(model, sets.train, count, context.seed)
        seen = {"data": data.parts(), "samples": count}
        net = self.calibrate(net, subject, batches, seen, context)

        # 2. Training; hundreds of the parameters are scalars, so they are stepped in one pass.
        optimizer = torch.optim.AdamW(optimizer_groups(net, rates_of(options)), fused=True)
        net, history = QatTraining(net, model, sets, optimizer, options, context).run()
        facts = history.facts()

        # 3. A correction of what the trained network predicts.
        if float_net is not None:
            samples = NoisedImages(model, sets.train, context.seed)
            facts["correction"] = correct(
                net, float_net, model, samples, context.processes, options.correction
            )
        return net, facts

    def require_startable(self, subject: Subject, world: int, micro_batches: int = 1) -> None:
        require_batch(self.options.batch_size, len(subject.data.train), world, micro_batches)

    def work(self, model: DiffusionModel, net: nn.Module, sampling_steps: int) -> Work:
        o = self.options
        parameters = sum(p.numel() for p in net.parameters())
        passes = STEP * o.updates * o.batch_size + (2 * IMAGES * TIME_STEPS if o.corrects else 0)
        text = f"{o.kind}, {o.updates} updates of {o.batch_size}"
        return Work(passes, parameters * 4 * (5 + o.checkpoints), text)


class QatTraining(Training):
    """Training with the penalties and the phases of quantizers; arguments as `Training`."""

    checkpoints: ClassVar[int] = QatOptions.checkpoints

    def __init__(
        self,
        net: nn.Module,
        model: DiffusionModel,
        sets: TrainingSets,
        optimizer: torch.optim.Optimizer,
        options: QatOptions,
        context: RunContext,
    ) -> None:
        super().__init__(net, model, sets, optimizer, options, context)
        self.first_final = round(options.updates * (1 - options.real_rounding))

    def phase(self, update: int) -> int:
        return int(update >= self.first_final)

    def set_phase(self, phase: int) -> None:
        set_final_phase(self.net, final=phase == 1)

    def penalty(self) -> Tensor | None:
        return penalty(self.net)


@dataclass(frozen=True)
class Rates:
    """Learning rates after warm-up, and weight decays.

    Args:
        weights: of weights, biases and norms.
        decay: weight decay of the weights.
        step_size: of rho (static and per-step intervals, weights' steps) and of lower bounds.
        zero_point: of zeta: the share of the grid that one update can move.
        generator: of TDQ's generators.
        generator_decay: their weight decay.
    """

    weights: float = 0.0
    decay: float = 0.0
    step_size: float = 0.0
    zero_point: float = 0.0
    generator: float = 0.0
    generator_decay: float = 0.0


def rates_of(options: QatOptions) -> Rates:
    """Return the rates of a training."""
    return Rates(
        weights=options.lr,
        decay=options.weight_decay,
        step_size=options.lr_step_size,
        zero_point=options.lr_zero_point,
        generator=options.lr_generator,
        generator_decay=options.decay_generator,
    )


def optimizer_groups(net: nn.Module, rates: Rates) -> list[dict[str, object]]:
    """Return every trainable parameter in exactly one named group; empty groups are left out."""
    numbers = {
        "weights": (rates.weights, rates.decay),
        "step_sizes": (rates.step_size, 0.0),
        "zero_points": (rates.zero_point, 0.0),
        "generators": (rates.generator, rates.generator_decay),
    }
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": numbers[kind][0],
            "weight_decay": numbers[kind][1],
        }
        for kind, parameters in parameter_groups(net).items()
        if parameters
    ]
