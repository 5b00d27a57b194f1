"""A correction of the quantized network's prediction, by tables over t, after any fit.

Quantization changes the predicted noise: eps_hat = eps + Delta. PTQD splits the error into a part
that goes with eps and a residual, and takes back what is known of both:

    Delta = k_t eps + Delta'                   k_t = cov(Delta, eps) / var(eps)
    eps_tilde = eps_hat / (1 + k_t) - b_t      b_t = mean(eps_hat / (1 + k_t) - eps), by channel
    v_t = var(eps_tilde - eps)

A sampler that adds noise of variance sigma_t^2 adds as much less as the residual brings along:

    sigma'_t^2 = max(sigma_t^2 - c_t^2 v_t, 0),   c_t = d x_{t-1} / d eps

Two rules differ in k_t (`fit.correction`):

    ptqd      max(k_t, 0), as in the published code: to divide by less than 1 would make the
              residual larger, and the whole error with it.
    rescale   max(k_t, -1/2). A network of few bits predicts too little, the less it sees of eps:
              that is the least square error, and so what training leads to. But the noise that is
              not predicted stays in the image. Divided by 1 + k_t the prediction has the size of
              eps again; it is at most doubled.

All three are measured at the time steps of a set of (x_t, t), and interpolated between them: the
calibration set after post-training quantization, noised training images after a training. They are
buffers of the network, so that a baked or packed network carries them.

Source: He et al., *PTQD: Accurate Post-Training Quantization for Diffusion Models*, NeurIPS 2023,
arXiv 2305.10657, section 3; `rescale` is ours. Unlike in the published code, the share of eps in
the update keeps the sampler's sigma_t: the noise that is left out is then all that changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import Stream, fixed_draws
from tdq_exp.diffusion.objective import NetworkInput, Samples
from tdq_exp.fit.calibrated import BATCH, noised
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track

TIME_STEPS = 50  # at which noised images are compared, evenly spaced from 0
IMAGES = 256  # at each of them
LEAST = {"ptqd": 0.0, "rescale": -0.5}  # k_t, by rule


class InputSet(Protocol):
    """Network inputs at some time steps, several at each."""

    def __len__(self) -> int: ...

    def times(self) -> Tensor:
        """Return the time step of each, `[N]`, int64."""
        ...

    def batch(self, part: slice) -> NetworkInput:
        """Return a part of them, on the CPU."""
        ...


class NoisedImages:
    """Training images noised to evenly spaced time steps.

    Args:
        model: whose inputs they are.
        images: the training set.
        seed: of the choice of images and of the noise.
    """

    def __init__(self, model: DiffusionModel, images: Samples, seed: int) -> None:
        self.model, self.images = model, images
        steps = min(TIME_STEPS, model.steps)
        draws = fixed_draws(
            seed,
            Stream.CORRECTION,
            samples=steps * IMAGES,
            images=len(images),
            shape=model.sample_shape,
            steps=steps,
            random=images.random,
        )
        # Stratified draws have as many samples in each of the intervals.
        starts = torch.arange(steps) * model.steps // steps
        self.draws = replace(draws, t=starts.index_select(0, draws.t))

    def __len__(self) -> int:
        return len(self.draws.t)

    def times(self) -> Tensor:
        return self.draws.t

    def batch(self, part: slice) -> NetworkInput:
        return noised(self.model, self.images, self.draws.of(part))


class NoiseCorrection(nn.Module):
    """k_t, b_t and v_t for every time step, applied to whatever the network returns.

    Args:
        channels: C.
        time: the network's time step.
    """

    def __init__(self, channels: int, time: TimeContext) -> None:
        super().__init__()
        self.time = time
        self.k: Tensor
        self.bias: Tensor
        self.variance: Tensor
        self.register_buffer("k", torch.zeros(time.steps))
        self.register_buffer("bias", torch.zeros(time.steps, channels))
        self.register_buffer("variance", torch.zeros(time.steps))

    def forward(self, eps_hat: Tensor) -> Tensor:
        """Return eps_tilde, `[B, C, H, W]`, at the network's current time step."""
        t = self.time.t.reshape(-1).to(self.k.device)
        scale = 1 + self.k.index_select(0, t)[:, None, None, None]
        bias = self.bias.index_select(0, t)[:, :, None, None]
        return eps_hat / scale - bias

    def _after_forward(self, net: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        output.sample = self(output.sample)
        return output


def attach(net: nn.Module, model: DiffusionModel) -> NoiseCorrection:
    """Give a quantized network a correction that changes nothing yet, and return it.

    The hook is a bound method, so that a deep copy of the network has its own.
    """
    time: Any = net.time
    correction = NoiseCorrection(model.sample_shape[0], time)
    net.correction = correction
    net.register_forward_hook(correction._after_forward)
    return correction


@torch.no_grad()
def correct(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    samples: InputSet,
    processes: Processes,
    rule: str,
) -> dict[str, float]:
    """Measure and attach the correction of a fitted network.

    The main process measures the whole set, and all take its tables: the last bits of a sum may
    differ between two processors.

    Args:
        net: quantized and fitted, on the device, without a correction.
        float_net: the same network in float.
        model: their description.
        samples: at which it is measured.
        processes: who shares the work; both networks are on their device.
        rule: see the head of this module.

    Returns:
        Facts for the record: the mean square error of the prediction over the set before and after,
        relative to that of eps, and the smallest and largest k.

    Raises:
        FloatingPointError: if a prediction is not finite.
    """
    net.eval()
    pair = Pair(net, float_net, model, processes.device)
    found = processes.decide(partial(tables, pair, samples, rule, show=True))
    return pair.correct(found)


@dataclass(frozen=True)
class Pair:
    """A quantized network and the float one, on a device, and their description."""

    net: nn.Module
    float_net: nn.Module
    model: DiffusionModel
    device: torch.device

    def predictions(self, samples: InputSet, first: int) -> tuple[Tensor, Tensor]:
        """Return eps and eps_hat of one batch of a set, on the CPU."""
        x, t, condition = samples.batch(slice(first, first + BATCH)).to(self.device)
        eps = Denoiser(self.float_net, self.model, condition)(x, t)
        eps_hat = Denoiser(self.net, self.model, condition)(x, t)
        return eps.cpu(), eps_hat.cpu()

    def correct(self, found: Tables) -> dict[str, float]:
        """Attach what was measured to the quantized network; return the facts."""
        correction = attach(self.net, self.model).to(self.device)
        correction.load_state_dict(found.tables)
        return found.facts


@dataclass(frozen=True)
class Tables:
    """Tables of a correction, on the CPU, and facts for the record."""

    tables: dict[str, Tensor]
    facts: dict[str, float]


@torch.no_grad()
def tables(pair: Pair, samples: InputSet, rule: str, show: bool = False) -> Tables:
    """Measure the tables of a correction over a set.

    Args, Raises: see `correct`; `show` prints how far it is.
    """
    # 1. Both predictions for every sample.
    firsts = range(0, len(samples), BATCH)
    pairs = []
    with track("measuring the correction", len(firsts), show=show) as advance:
        for first in firsts:
            pairs.append(pair.predictions(samples, first))
            advance("")
    eps, eps_hat = (torch.cat(values) for values in zip(*pairs, strict=True))

    # 2. Slope, bias and variance at each time step of the set.
    times = samples.times()
    measured = {}
    for step in sorted(set(times.tolist())):
        at_step = times == step
        measured[int(step)] = _measure(eps[at_step], eps_hat[at_step], int(step), rule)

    # 3. Tables over all time steps.
    time: Any = pair.net.time
    correction = NoiseCorrection(pair.model.sample_shape[0], time)
    _fill(correction, measured)

    # 4. What they are worth on the set.
    k = correction.k.index_select(0, times)[:, None, None, None]
    bias = correction.bias.index_select(0, times)[:, :, None, None]

    size = float(eps.square().mean())

    facts = {
        "error_before": float((eps_hat - eps).square().mean()) / size,
        "error_after": float((eps_hat / (1 + k) - bias - eps).square().mean()) / size,
        "k_min": float(correction.k.min()),
        "k_max": float(correction.k.max()),
    }
    return Tables(dict(correction.state_dict()), facts)


@dataclass(frozen=True)
class _Measured:
    """What was measured at one time step: k_t, b_t `[C]` and v_t."""

    k: float
    bias: Tensor
    variance: float


def _measure(eps: Tensor, eps_hat: Tensor, t: int, rule: str) -> _Measured:
    """Return the correction of one time step, computed in double precision."""
    eps, eps_hat = eps.double(), eps_hat.double()
    error, centred = eps_hat - eps, eps - eps.mean()

    slope = float((centred * error).mean() / centred.square().mean().clamp(min=1e-20))
    if not math.isfinite(slope):
        raise FloatingPointError(
            f"fit.correction={rule}: at t = {t} a prediction of the set is not finite"
        )
    k = max(slope, LEAST[rule])

    residual = eps_hat / (1 + k) - eps
    bias = residual.mean(dim=(0, 2, 3))
    variance = (residual - bias[:, None, None]).square().mean()
    return _Measured(k, bias, float(variance))


def _fill(correction: NoiseCorrection, measured: Mapping[int, _Measured]) -> None:
    """Set the tables: linear between two measured time steps, constant beyond the outermost."""
    rows = list(measured.values())
    known = torch.tensor(list(measured), dtype=torch.float64)
    t = torch.arange(correction.time.steps, dtype=torch.float64)

    right = torch.searchsorted(known, t).clamp(max=len(rows) - 1)
    left = (right - 1).clamp(min=0)
    share = ((t - known[left]) / (known[right] - known[left]).clamp(min=1)).clamp(0, 1)

    def table(values: Tensor) -> Tensor:
        weight = share.reshape(-1, *[1] * (values.dim() - 1))
        return (values[left] * (1 - weight) + values[right] * weight).float()

    correction.k.copy_(table(torch.tensor([row.k for row in rows], dtype=torch.float64)))
    correction.bias.copy_(table(torch.stack([row.bias for row in rows])))
    variance = torch.tensor([row.variance for row in rows], dtype=torch.float64)
    correction.variance.copy_(table(variance))
