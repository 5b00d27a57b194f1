"""The noise schedule of a discrete-time diffusion model.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),   abar_t = prod_{i <= t} (1 - beta_i)

Source: Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models* (2020), eq. (4). Cosine betas:
Nichol, Dhariwal, *Improved Denoising Diffusion Probabilistic Models* (2021), eq. (17).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdq_exp.config.setting import require

BETA_SHAPES = ("linear", "scaled_linear", "squaredcos_cap_v2")
COSINE_OFFSET = 0.008  # keeps the first betas from vanishing
LARGEST_BETA = 0.999  # so that abar_{T-1} > 0: a pure noise x_t would not say what eps is


@dataclass(frozen=True)
class Schedule:
    """Betas over `steps` time steps, and the cumulative products that training and sampling read.

    Args:
        steps: T, the number of time steps (1000 in the paper).
        shape: `linear` is linear in beta (DDIM's CIFAR-10), `scaled_linear` in sqrt(beta) (LDM);
            `squaredcos_cap_v2` are improved DDPM's cosine betas, by diffusers' name.
        beta_start: beta at t = 0; cosine betas do not use it.
        beta_end: beta at t = T - 1, likewise.

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
        """`[T]`, float64: the products below lose digits at t near T in single precision.

        On the CPU, whatever device is the default where they are first asked for: they are kept.
        """
        with torch.device("cpu"):
            return self._betas()

    def _betas(self) -> Tensor:
        if self.shape == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

        if self.shape == "squaredcos_cap_v2":
            share = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            angle = (share + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2
            abar = angle.cos().square()
            return (1 - abar[1:] / abar[:-1]).clamp(max=LARGEST_BETA)

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
        abar = self._abar(t, x_0)
        return (abar.sqrt() * x_0 + (1 - abar).sqrt() * eps).to(x_0.dtype)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), in the type of a batch that they multiply.

        Args:
            t: `[B]`, or 0-dim for a batch at one time step.
            like: the batch, `[B, ...]`.
        """
        abar = self._abar(t, like)
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def _abar(self, t: Tensor, like: Tensor) -> Tensor:
        """Return abar_t, float64, in a shape that multiplies a batch.

        Plain indexing with a 0-dim t would wait for an accelerator to say what t is.
        """
        values, t = self._alphas_cumprod_on(like.device), t.reshape(-1).to(like.device)
        return values.index_select(0, t).reshape(-1, *[1] * (like.dim() - 1))

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
