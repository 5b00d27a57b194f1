"""Paired distance: a quantized model's images beside the float model's, from the same noise.

    relative L2 = |x - x_float| / |x_float|        over pixels in -1..1, and over x_t on the way
    PSNR        = 10 log10(255^2 / mean (p - p_float)^2)        in dB, over pixels in 0..255

One group of images is enough: what differs is the network alone, not the draw. It costs seconds,
where a Frechet distance needs thousands of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.engines import SIMULATED
from tdq_exp.experiment.sample_stage import SampledSet, sample_group
from tdq_exp.models.denoiser import Denoiser

POINTS = 10  # time steps at which x_t is compared


def paired_distance(
    job: Experiment,
    quantized: Callable[[], nn.Module],
    images: SampledSet,
    device: torch.device,
) -> dict[str, Any] | None:
    """Return the distance of a set's first group of images to the float model's.

    Args:
        job: the experiment.
        quantized: gives the baked network of the set.
        images: the set.
        device: where to compute.

    Returns:
        `images`, how many were compared; `relative_l2` and `psnr` (None for equal images) of the
        pixels; `over_t`, a list of `t` and `relative_l2` of x_t, where quantization was simulated.
        None for a float model.
    """
    if job.recipe is None or job.weights.path is None:
        return None

    # The float network's images, from the noise of the set.
    net = job.model.build()
    job.weights.load(job.model, net)
    expected, float_states = _group(job, net, device)

    pixels = images.pixels[: len(expected)]
    result = {"images": len(expected), **distances(pixels, expected)}
    if not images.engine.startswith(SIMULATED):
        return result

    # On the way: the same group once more, through the network that made the set.
    _, states = _group(job, quantized(), device)
    over_t = [
        {"t": t, "relative_l2": relative_l2(states[t], float_states[t])} for t in sorted(states)
    ]
    return {**result, "over_t": over_t}


def distances(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> dict[str, float | None]:
    """Return `relative_l2` and `psnr` of images, uint8 `[N, H, W, C]`, from others."""
    ours, theirs = (torch.from_numpy(p.astype(np.float64)) for p in (pixels, expected))
    error = float((ours - theirs).square().mean())

    psnr = 10 * math.log10(255**2 / error) if error else None
    return {"relative_l2": relative_l2(ours / 127.5 - 1, theirs / 127.5 - 1), "psnr": psnr}


def relative_l2(x: Tensor, expected: Tensor) -> float:
    """Return |x - expected| / |expected| over all elements."""
    difference = (x.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-12))


def _group(
    job: Experiment, net: nn.Module, device: torch.device
) -> tuple[NDArray[np.uint8], dict[int, Tensor]]:
    """Return the first group of images of a network, and x_t at some of the time steps."""
    s = job.sampling
    every = max(1, s.steps // POINTS)
    states: dict[int, Tensor] = {}
    calls = 0

    def keep(t: int, x_t: Tensor) -> None:
        nonlocal calls
        if calls and calls % every == 0:  # before the first step both are the same noise
            states[int(t)] = x_t.detach().cpu().clone()
        calls += 1

    pixels = sample_group(
        Denoiser(net.to(device).eval(), job.model),
        job.sampler,
        range(min(s.batch, s.images)),
        seed=s.seed,
        device=device,
        truncate=s.truncate,
        on_step=keep,
    )
    return pixels, states
