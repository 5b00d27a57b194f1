"""Which layer makes how much of the error of x_0: each activation quantizer is on alone.

    e_l = |x_0 with quantizer l alone - x_0 with none|^2 / |x_0 with none|^2
    share_l = e_l / sum e

All samplings start from the same noise and take the network's quantized weights, so that the errors
are those of activations. The errors of single quantizers need not add up to that of all of them
together, which is measured too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.analysis.quantizers import switched_off
from tdq_exp.analysis.trajectory import rounded
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment.build import Experiment
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.runtime.progress import track


@torch.no_grad()
def measure(
    job: Experiment, net: nn.Module, images: int, steps: int, seed: int = 0
) -> dict[str, Any]:
    """Sample with no activation quantized, with all, and with each alone.

    Args:
        job: of the network.
        net: quantized and baked.
        images: sampled together.
        steps: of the sampling.
        seed: of the starting noise.

    Returns:
        `errors`: quantizer -> e_l; `together`: the error of all; `shares`: quantizer -> share.
    """
    sampler = dataclasses.replace(job.sampler, steps=steps, eta=0.0)
    noise = starting_noise(image_generators(seed, range(images)), job.model.sample_shape)
    quantizers = activation_quantizers(net)

    def sampled() -> Tensor:
        return sampler.sample(Denoiser(net, job.model), noise, job.model.schedule)

    together = sampled()
    with switched_off(*quantizers.values()):
        exact = sampled()

    errors = {}
    with track(f"quantizers of {job.name}, each alone", len(quantizers)) as advance:
        for name in quantizers:
            others = [quantizer for other, quantizer in quantizers.items() if other != name]
            with switched_off(*others):
                errors[name.removesuffix("_quantizer")] = _relative(sampled(), exact)
            advance(name)

    total = sum(errors.values()) or 1.0
    shares = {name: error / total for name, error in errors.items()}
    return rounded({"errors": errors, "together": _relative(together, exact), "shares": shares})


def _relative(x_0: Tensor, exact: Tensor) -> float:
    return float((x_0 - exact).square().sum() / exact.square().sum())
