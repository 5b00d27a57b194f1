"""DDPM and PNDM of diffusers, behind the same call as `diffusion.ddim.Ddim`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from tdq_exp.diffusion.ddim import time_steps
from tdq_exp.diffusion.objective import NoisePredictor
from tdq_exp.diffusion.options import TrajectoryOptions
from tdq_exp.diffusion.schedule import Schedule

OnStep = Callable[[int, Tensor], None]


@dataclass(unsafe_hash=True)
class _DiffusersSampler(TrajectoryOptions):
    """A sampler of diffusers.

    Args:
        steps: S.
        spacing: `leading`, `trailing` or `linspace`, as diffusers means them.
        eta: must be 0: these samplers have a variance of their own, or none.
        clip: whether x0_hat is limited to [-1, 1].
        offset: diffusers' `steps_offset`.
        final_alpha_one: diffusers' `set_alpha_to_one`; PNDM alone has it, DDPM always ends at 1.

    Raises:
        ValueError: naming the key.
    """

    steps: int = field()

    fewest: ClassVar[int] = 1
    keeps_variance: ClassVar[bool] = False  # whether it adds noise that no correction can lessen

    def __post_init__(self) -> None:
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"sampler.spacing={self.spacing!r}: this sampler takes leading, trailing or"
                " linspace"
            )
        if self.eta:
            raise ValueError("sampler.eta: only DDIM has it")

    def _scheduler(self, schedule: Schedule) -> Any:
        raise NotImplementedError(type(self).__name__)

    def _common(self, schedule: Schedule) -> dict[str, Any]:
        return {
            "num_train_timesteps": schedule.steps,
            "trained_betas": schedule.betas.float().numpy(),
            "timestep_spacing": self.spacing,
            "steps_offset": self.offset,
        }

    def sample(
        self,
        denoise: NoisePredictor,
        x: Tensor,
        schedule: Schedule,
        generators: Sequence[torch.Generator] = (),
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Follow the trajectory from pure noise to a sample; arguments as `Ddim.sample`."""
        scheduler = self.check(schedule)  # fresh for each batch: PNDM keeps its history inside
        scheduler.set_timesteps(self.steps, device=x.device)

        # Only DDPM draws noise on the way.
        extra = {}
        if isinstance(scheduler, DDPMScheduler):
            if len(generators) != len(x):
                raise ValueError("DDPM needs one generator per sample")
            extra = {"generator": list(generators)}

        for t in scheduler.timesteps:
            if on_step is not None:
                on_step(int(t), x)
            x = scheduler.step(denoise(x, t).to(x.dtype), t, x, return_dict=False, **extra)[0]
        return x

    def check(self, schedule: Schedule) -> Any:
        """Refuse time steps that the schedule does not have; return diffusers' scheduler.

        Raises:
            ValueError: naming the key.
        """
        if not 1 <= self.steps <= schedule.steps:
            raise ValueError(
                f"sampler.steps={self.steps}: must be between 1 and the model's"
                f" {schedule.steps} time steps"
            )

        if self.steps < self.fewest:
            raise ValueError(
                f"sampler.steps={self.steps}: this sampler needs at least {self.fewest}"
            )

        scheduler = self._scheduler(schedule)
        scheduler.set_timesteps(self.steps)

        visited = scheduler.timesteps
        if int(visited.max()) >= schedule.steps or int(visited.min()) < 0:
            raise ValueError(
                f"sampler: {self.spacing} spacing with steps={self.steps}, offset={self.offset}"
                f" leaves the {schedule.steps} time steps; take fewer steps or another offset"
            )
        return scheduler


class Ddpm(_DiffusersSampler):
    """Ancestral sampling with the posterior's variance. Source: Ho et al. 2020, algorithm 2."""

    keeps_variance: ClassVar[bool] = True

    def _scheduler(self, schedule: Schedule) -> Any:
        return DDPMScheduler(
            clip_sample=self.clip, variance_type="fixed_small", **self._common(schedule)
        )


class Pndm(_DiffusersSampler):
    """Pseudo numerical method of fourth order, Runge-Kutta warm-up included.

    diffusers' step goes from t to t - T // S, whatever comes next: time steps of any other distance
    are refused. `leading` has them always, `trailing` where S divides T.

    Source: Liu et al., arXiv 2202.09778.
    """

    fewest: ClassVar[int] = 4  # the warm-up alone takes three

    def check(self, schedule: Schedule) -> Any:
        """Refuse time steps that the update does not lead to; see `_DiffusersSampler.check`."""
        scheduler = super().check(schedule)
        stride = schedule.steps // self.steps
        visited = time_steps(self.spacing, self.steps, schedule.steps)

        if any(t - after != stride for t, after in pairwise(visited)):
            raise ValueError(
                f"sampler.spacing={self.spacing}: PNDM steps by {stride} of {schedule.steps} time"
                f" steps, and with steps={self.steps} these lie elsewhere; take"
                " sampler.spacing=leading"
            )
        return scheduler

    def _scheduler(self, schedule: Schedule) -> Any:
        if self.clip:
            raise ValueError("sampler.clip=true: PNDM does not clip x_0; set sampler.clip=false")
        return PNDMScheduler(set_alpha_to_one=self.final_alpha_one, **self._common(schedule))
