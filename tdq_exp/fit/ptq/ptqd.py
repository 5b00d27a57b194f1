"""PTQD: a correction of the quantized network's prediction, by tables over t.

Quantization changes the predicted noise: eps_hat = eps + Delta. PTQD splits the error into a part
that goes with eps and a residual, and takes back what is known of both:

    Delta = k_t eps + Delta'                   k_t = max(cov(Delta, eps) / var(eps), 0)
    eps_tilde = eps_hat / (1 + k_t) - b_t      b_t = mean(eps_hat / (1 + k_t) - eps), by channel
    v_t = var(eps_tilde - eps)

A sampler that adds noise of variance sigma_t^2 adds as much less as the residual brings along:

    sigma'_t^2 = max(sigma_t^2 - c_t^2 v_t, 0),   c_t = d x_{t-1} / d eps

All three are measured on the calibration set, at the time steps that it holds, and interpolated
between them. They are buffers of the network, so that a baked or packed network carries them.

Source: He et al., *PTQD: Accurate Post-Training Quantization for Diffusion Models*, NeurIPS 2023,
arXiv 2305.10657, section 3. As in the published code, a k_t below 0 counts as 0: to divide by less
than 1 would make the residual larger, and the whole error with it. Unlike there, the share of eps
in the update keeps the sampler's sigma_t: the noise that is left out is then all that changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.fit.calibrated import BATCH
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes


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
    samples: CalibrationSet,
    processes: Processes,
) -> dict[str, float]:
    """Measure and attach the correction of a fitted network.

    The main process measures the whole set, and all take its tables: the last bits of a sum may
    differ between two processors.

    Args:
        net: quantized and fitted, on the device, without a correction.
        float_net: the same network in float.
        model: their description.
        samples: the calibration set.
        processes: who shares the work; both networks are on their device.

    Returns:
        Facts for the record: the mean square error of the prediction over the set before and after,
        relative to that of eps, and the smallest and largest k.

    Raises:
        FloatingPointError: if a prediction is not finite.
    """
    net.eval()
    found = processes.decide(partial(_tables, net, float_net, model, samples, processes.device))

    correction = attach(net, model).to(processes.device)
    correction.load_state_dict(found.tables)
    return found.facts


@dataclass(frozen=True)
class _Found:
    """Tables of a correction, on the CPU, and facts for the record."""

    tables: dict[str, Tensor]
    facts: dict[str, float]


def _tables(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    device: torch.device,
) -> _Found:
    """Measure the tables of a correction over a calibration set."""
    # 1. Both predictions for every sample.
    pairs = [
        _predictions(net, float_net, model, samples, first, device) for first in _firsts(samples)
    ]

    eps, eps_hat = (torch.cat(values) for values in zip(*pairs, strict=True))

    # 2. Slope, bias and variance at each time step of the set.
    times = samples.times()
    measured = {}
    for step in sorted(set(times.tolist())):
        at_step = times == step
        measured[int(step)] = _measure(eps[at_step], eps_hat[at_step], int(step))

    # 3. Tables over all time steps.
    time: Any = net.time
    correction = NoiseCorrection(model.sample_shape[0], time)
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
    return _Found(dict(correction.state_dict()), facts)


def _firsts(samples: CalibrationSet) -> range:
    return range(0, len(samples), BATCH)


def _predictions(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    first: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return eps and eps_hat of one batch of the set, on the CPU."""
    x, t, condition = samples.batch(slice(first, first + BATCH)).to(device)
    eps = Denoiser(float_net, model, condition)(x, t)
    eps_hat = Denoiser(net, model, condition)(x, t)
    return eps.cpu(), eps_hat.cpu()


@dataclass(frozen=True)
class _Measured:
    """What was measured at one time step: k_t, b_t `[C]` and v_t."""

    k: float
    bias: Tensor
    variance: float


def _measure(eps: Tensor, eps_hat: Tensor, t: int) -> _Measured:
    """Return the correction of one time step, computed in double precision."""
    eps, eps_hat = eps.double(), eps_hat.double()
    error, centred = eps_hat - eps, eps - eps.mean()

    slope = float((centred * error).mean() / centred.square().mean().clamp(min=1e-20))
    if not math.isfinite(slope):
        raise FloatingPointError(
            f"fit.correction=ptqd: at t = {t} a prediction of the calibration set is not finite"
        )
    k = max(slope, 0.0)

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
