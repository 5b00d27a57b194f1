"""What the benches time: training and denoising steps, taken in turn within one process.

A machine whose speed drifts slows everything that is compared alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tdq_exp.data.images import Images
from tdq_exp.fit.loop import TrainingSets
from tdq_exp.fit.options import QatOptions
from tdq_exp.fit.qat import QatTraining, optimizer_groups, rates_of
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.calibrate import calibrating
from tdq_exp.quant.convert import Recipe
from tdq_exp.quant.kernels import unfused
from tdq_exp.runtime.context import RunContext

Step = Callable[[], object]

WARM_UP = 2  # rounds that are not counted


def quantized(model: DiffusionModel, recipe: Recipe, x: Tensor, t: Tensor) -> nn.Module:
    """Return a calibrated network in training form.

    Args:
        model: whose network is built.
        recipe: how it is quantized.
        x, t: samples `[N, C, H, W]` and time steps `[N]` for the start values.
    """
    net = model.build()
    model.quantize(net, recipe)

    with calibrating(net.eval(), 1), torch.no_grad():
        model.predict(net, x, t)
    return net.train()


def training_step(model: DiffusionModel, net: nn.Module, x: Tensor, t: Tensor) -> Step:
    """Return forward, backward and optimiser step of one batch."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model.predict(net, x, t) - x).square().mean().backward()
        optimizer.step()

    return step


def denoising_step(model: DiffusionModel, net: nn.Module, x: Tensor) -> Step:
    """Return one forward pass at one time step for the whole batch."""
    net.eval()

    @torch.no_grad()
    def step() -> Tensor:
        return model.predict(net, x, torch.tensor(500))

    return step


def fit_options(updates: int, batch: int, rate: float, precision: str = "float32") -> QatOptions:
    """Return options of a fit of one phase: at another one a GPU would record again."""
    return QatOptions(
        kind="qat", updates=updates, batch_size=batch, precision=precision, real_rounding=0.0,
        validate_every=updates, validation_samples=8, lr=rate, lr_step_size=rate,
        lr_zero_point=rate, lr_generator=rate,
    )  # fmt: skip


def training_of(
    model: DiffusionModel, net: nn.Module, options: QatOptions, context: RunContext
) -> QatTraining:
    """Return the training that a fit runs, on images of noise."""
    size, channels = model.sample_shape[-1], model.sample_shape[0]
    shape = (2000, size, size, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    sets = TrainingSets(Images(pixels, "noise", ""), Images(pixels[:64], "noise", ""))
    optimizer = torch.optim.AdamW(optimizer_groups(net, rates_of(options)), fused=True)
    return QatTraining(net, model, sets, optimizer, options, context)


def without_kernels(step: Step) -> Step:
    """Return the same step with one operation after another in the place of fused kernels."""

    def run() -> None:
        with unfused():
            step()

    return run


def medians(
    steps: Mapping[str, Step], rounds: int, pause: float = 0.0
) -> dict[str, dict[str, float]]:
    """Run every step in turn and return the minimum, median and maximum of each in milliseconds.

    Args:
        steps: by name.
        rounds: that are counted; two before them warm up.
        pause: seconds before each, for steps of different thread pools, whose threads go on
            spinning for a while.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}

    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            time.sleep(pause)
            began = time.perf_counter()
            step()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))

    return {name: _spread(values) for name, values in times.items()}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": sorted(values)[len(values) // 2], "max": max(values)}
