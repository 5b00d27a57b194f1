"""The noise-prediction objective, and the contracts of what it is evaluated on.

L = E_{x_0, t, eps} | eps - eps_theta(x_t, t) |^p,   p = 2 (DDPM) or 1 (LDM as released)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOSSES = ("l2", "l1")


class NoisePredictor(Protocol):
    """Predicts the noise in x_t; a condition, if there is one, is its own (see `Denoiser`)."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...


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
