"""The noise schedule of a discrete-time diffusion model.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),   abar_t = prod_{i <= t} (1 - beta_i)

Source: Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models* (2020), eq. (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdq_exp.config.setting import require

BETA_SHAPES = ("linear", "scaled_linear")


@dataclass(frozen=True)
class Schedule:
    """Betas over `steps` time steps, and the cumulative products that training and sampling read.

    Args:
        steps: T, the number of time steps (1000 in the paper).
        shape: `linear` is linear in beta (DDIM's CIFAR-10), `scaled_linear` in sqrt(beta) (LDM).
        beta_start: beta at t = 0.
        beta_end: beta at t = T - 1.

    Raises:
        ValueError: for an unknown shape, or betas that are not in (0, 1).
    """

    steps: int = 1000
    shape: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.shape not in BETA_SHAPES:
            raise ValueError(
                f"model.schedule.shape={self.shape!r}: choose one of {', '.join(BETA_SHAPES)}"
            )
        require("model.definition.schedule.steps", self.steps, int, low=1, most=10**6)
        for name in ("beta_start", "beta_end"):
            require(f"model.definition.schedule.{name}", getattr(self, name), float)
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("model.schedule: needs steps >= 1 and 0 < beta_start <= beta_end < 1")

    @cached_property
    def betas(self) -> Tensor:
        """`[T]`, float64: the products below lose digits at t near T in single precision."""
        if self.shape == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        root = torch.linspace(
            self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64
        )
        return root.square()

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar, `[T]`, float64."""
        return (1 - self.betas).cumprod(0)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`.

        Args:
            x_0: clean samples, `[B, C, H, W]`.
            eps: standard normal noise of the same shape.
            t: time steps, `[B]`, integer.
        """
        abar = self._alphas_cumprod_on(x_0.device)[t].reshape(-1, *[1] * (x_0.dim() - 1))
        return (abar.sqrt() * x_0 + (1 - abar).sqrt() * eps).to(x_0.dtype)

    def _alphas_cumprod_on(self, device: torch.device) -> Tensor:
        """Return abar on a device, copied once: each copy would wait for the device."""
        if device not in self._copies:
            copied = self.alphas_cumprod.to(device)
            if type(copied) is not Tensor:  # a fake tensor of torch.export
                return copied
            self._copies[device] = copied
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}
