"""The objective of a denoising network, and the contracts of what it is evaluated on.

L = E_{x_0, t, eps} | eps - eps_theta(x_t, t) |^p,   p = 2 (DDPM) or 1 (LDM as released)

A network may predict x_0 or v in place of eps, by diffusers' names of `PREDICTIONS`:

    epsilon        eps
    sample         x_0
    v_prediction   v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

The loss is then that of its own target. Samplers ask for eps, which follows from x_t and each.

Source: Salimans, Ho, *Progressive Distillation for Fast Sampling of Diffusion Models* (2022),
appendix D.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tdq_exp.diffusion.schedule import Schedule

LOSSES = ("l2", "l1")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class NoisePredictor(Protocol):
    """Predicts the noise in x_t; a condition, if there is one, is its own (see `Denoiser`)."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...


@runtime_checkable
class ConditionedPredictor(NoisePredictor, Protocol):
    """A predictor that says its condition, and can be given another one."""

    @property
    def condition(self) -> Tensor | None:
        """What the network is told beside t, `[B, ...]`; None for an unconditional model."""
        ...

    def conditioned(self, condition: Tensor | None, device: torch.device) -> NoisePredictor:
        """Return a predictor by the same network, with another condition.

        Args:
            condition: `[B, ...]`; a tensor on the device is read where it is.
            device: of the network.
        """
        ...


class NetworkInput(NamedTuple):
    """A batch of what a network is called with.

    Args:
        x_t: `[B, C, H, W]`.
        t: `[B]`, int64.
        condition: what the network is told beside t, `[B, ...]`; None for an unconditional model.
    """

    x_t: Tensor
    t: Tensor
    condition: Tensor | None = None

    def to(self, device: torch.device) -> NetworkInput:
        """Return the batch on a device."""
        condition = None if self.condition is None else self.condition.to(device)
        return NetworkInput(self.x_t.to(device), self.t.to(device), condition)


class Samples(Protocol):
    """A training set as what the network denoises: each image's x_0, or a distribution of it."""

    @property
    def content(self) -> str:
        """Hash of what the samples are."""
        ...

    @property
    def random(self) -> bool:
        """Whether each sample is a distribution, from which every batch draws anew."""
        ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_0 of some samples, `[B, C, H, W]`, those with `flip` of the mirrored image.

        Args:
            index: `[B]`, int64.
            flip: `[B]`, bool.
            noise: `[B, C, H, W]`, standard normal; what random samples are drawn with.
        """
        ...

    def condition(self, index: Tensor) -> Tensor | None:
        """Return the condition of some samples, `[B, ...]`, such as class labels; None without.

        Args:
            index: `[B]`, int64.
        """
        ...


def noise_prediction_loss(eps_hat: Tensor, eps: Tensor, kind: str = "l2") -> Tensor:
    """Return the mean over all elements of `|eps - eps_hat|^p`; scalar, float32.

    Raises:
        ValueError: for a kind that is neither `l1` nor `l2`.
    """
    difference = eps_hat.float() - eps
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    raise ValueError(f"loss={kind!r}: choose one of {', '.join(LOSSES)}")


def target_of(kind: str, x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return what a network should answer, `[B, C, H, W]`.

    Args:
        kind: one of `PREDICTIONS`.
        x_0: clean samples, `[B, C, H, W]`.
        eps: the noise in x_t.
        t: time steps, `[B]`, integer.
        schedule: abar.
    """
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    signal, noise = schedule.coefficients(t, x_0)
    return signal * eps - noise * x_0


def noise_of(kind: str, answer: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return eps_hat of a network's answer, `[B, C, H, W]`.

        sample         eps_hat = (x_t - sqrt(abar_t) x_0_hat) / sqrt(1 - abar_t)
        v_prediction   eps_hat = sqrt(abar_t) v_hat + sqrt(1 - abar_t) x_t

    Args:
        kind: one of `PREDICTIONS`.
        answer: of the network.
        x_t: what it was shown.
        t: `[B]`, or 0-dim for a batch at one time step.
        schedule: abar.
    """
    if kind == "epsilon":
        return answer
    signal, noise = schedule.coefficients(t, x_t)
    if kind == "sample":
        return (x_t - signal * answer) / noise
    return signal * answer + noise * x_t
