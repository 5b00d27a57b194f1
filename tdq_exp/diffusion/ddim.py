"""DDIM sampling over explicit pairs (t, t_prev).

    x0_hat = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t)
    sigma  = eta sqrt((1 - abar_prev) / (1 - abar_t)) sqrt(1 - abar_t / abar_prev)
    x_prev = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - sigma^2) eps_hat + sigma z

Source: Song, Meng, Ermon, *Denoising Diffusion Implicit Models* (2021), eq. (12) and (16).

The step is ours, not a library's, because t_prev is here whatever comes next in the sequence.
diffusers' `DDIMScheduler` always steps to t - T // S, which is right for `leading` only (and for
`trailing` where S divides T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tdq_exp.config.setting import about, require
from tdq_exp.diffusion.objective import NoisePredictor
from tdq_exp.diffusion.options import TrajectoryOptions, trajectory_values
from tdq_exp.diffusion.schedule import Schedule

SPACINGS = ("leading", "uniform", "trailing", "linspace", "quad")


def time_steps(spacing: str, count: int, total: int, offset: int = 0) -> list[int]:
    """Return the time steps that a sampler visits, noisiest first.

    | spacing  | t_i for i = 0..S-1, before reversal and offset | source |
    |----------|-----------------------------------------------|--------|
    | leading  | i floor(T / S)                                | "uniform" if S divides T |
    | uniform  | the same, for every i with i floor(T / S) < T | DDIM's "uniform" |
    | trailing | round(T - i T / S) - 1, descending            | Lin et al. 2023, table 2 |
    | linspace | round(i (T - 1) / (S - 1))                    | iDDPM |
    | quad     | floor((i sqrt(0.8 T) / (S - 1))^2)            | DDIM's "quad" |

    DDIM's own code visits `range(0, T, T // S)`: where S does not divide T that is more than S
    steps, up to the noisiest. `uniform` does so too; `leading` stops after S.

    `quad` names small steps more than once. From a step to itself the update is the identity, so
    each is visited once: the sequence is shorter than S, the images are the same.

    Args:
        spacing: one of `SPACINGS`.
        count: S, number of sampling steps.
        total: T, number of time steps of the schedule.
        offset: added to every step (`leading`, `uniform` and `quad`; LDM uses 1).

    Raises:
        ValueError: for an unknown spacing, S outside 1..T, or a sequence that visits a time step
            twice or leaves 0..T-1.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"sampler.spacing={spacing!r}: choose one of {', '.join(SPACINGS)}")

    if not 1 <= count <= total:
        raise ValueError(
            f"sampler.steps={count}: must be between 1 and the model's {total} time steps"
        )

    if not 0 <= offset < total:
        raise ValueError(
            f"sampler.offset={offset}: must be between 0 and the last of the model's {total} time"
            " steps"
        )

    # Least noisy step first; all spacings but `quad` have S of them.
    i = torch.arange(count, dtype=torch.float64)
    if spacing == "leading":
        steps = (i * (total // count)).long() + offset
    elif spacing == "uniform":
        steps = torch.arange(0, total, total // count) + offset
    elif spacing == "trailing":
        steps = (total - i * total / count).round().long().flip(0) - 1
    elif spacing == "linspace":
        steps = (i * (total - 1) / max(count - 1, 1)).round().long()
    else:
        steps = (
            torch.linspace(0, (0.8 * total) ** 0.5, count, dtype=torch.float64)
            .square()
            .floor()
            .long()
            .unique()
            + offset
        )

    repeats = spacing != "quad" and len(steps.unique()) < count
    if repeats or int(steps.max()) >= total or int(steps.min()) < 0:
        raise ValueError(
            f"sampler: {spacing} spacing with steps={count}, offset={offset} repeats or leaves the"
            f" {total} time steps; "
            "take fewer steps or another spacing"
        )

    return [int(t) for t in steps.flip(0)]


class Coefficients(NamedTuple):
    """The numbers of one update; see the formulas above."""

    signal: float  # sqrt(abar_t)
    noise: float  # sqrt(1 - abar_t)
    signal_prev: float  # sqrt(abar_prev)
    towards_x_t: float  # sqrt(1 - abar_prev - sigma^2)
    sigma: float


@dataclass(unsafe_hash=True)
class Ddim(TrajectoryOptions):
    """DDIM over any sequence of time steps.

    Args:
        steps: S.
        spacing: see `time_steps`.
        eta: 0 is deterministic, 1 has DDPM's variance.
        clip: whether x0_hat is limited to [-1, 1], and eps_hat derived from it again.
        offset: see `time_steps`.
        final_alpha_one: whether abar is 1 after the last step (DDIM), and not abar_0 (LDM).
    """

    steps: int = field()

    keeps_variance: ClassVar[bool] = False  # a predictor's own error lessens the noise, if known

    def __post_init__(self) -> None:
        require("sampler.eta", self.eta, float, **about(TrajectoryOptions, "eta"))

    @classmethod
    def without_noise(cls, values: Mapping[str, Any]) -> Ddim:
        """Return the sampler of trajectories: eta is 0, all else is that of the group `sampler`."""
        return cls(**trajectory_values(values) | {"eta": 0.0})

    def check(self, schedule: Schedule) -> None:
        """Refuse time steps that the schedule does not have.

        Raises:
            ValueError: naming the key.
        """
        self.pairs(schedule)

    def pairs(self, schedule: Schedule) -> list[tuple[int, int]]:
        """Return (t, t_prev), noisiest first; the last t_prev is -1, "no noise left"."""
        visited = time_steps(self.spacing, self.steps, schedule.steps, self.offset)
        return list(zip(visited, [*visited[1:], -1], strict=True))

    def sample(
        self,
        denoise: NoisePredictor,
        x: Tensor,
        schedule: Schedule,
        generators: Sequence[torch.Generator] = (),
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Follow the trajectory from pure noise to a sample.

        Args:
            denoise: predicts eps from (x_t, t); t is a 0-dim tensor, one for the whole batch.
            x: x_T, `[B, C, H, W]`.
            schedule: abar.
            generators: one per sample, for eta > 0.
            on_step: called with (t, x_t) before every step.

        Returns:
            x_0, `[B, C, H, W]`.
        """
        trajectory = self.trajectory(denoise, schedule)
        numbers: Sequence[Coefficients | Sequence[Tensor]] = [values for _, values in trajectory]
        if x.is_cuda:
            # Numbers and tensors are rounded differently there; a recorded step has only tensors.
            numbers = [row.unbind() for row in as_table(trajectory, x)]

        for (t, values), row in zip(trajectory, numbers, strict=True):
            if on_step is not None:
                on_step(t, x)
            eps = denoise(x, torch.tensor(t, device=x.device)).to(x.dtype)
            z = self.noise(x, generators) if values.sigma > 0 else None
            x = self.update(eps, x, row, z)
        return x

    def trajectory(
        self, denoise: NoisePredictor, schedule: Schedule
    ) -> list[tuple[int, Coefficients]]:
        """Return each visited t with the numbers of its update, noisiest first.

        A predictor may know the variance v_t of its own error, as PTQD's correction does. The error
        reaches x_{t-1} times c, and so sigma'^2 = max(sigma^2 - c^2 v_t, 0) is left to be added.
        Where `clip` limits x0_hat, c is what it would be without.
        """
        known = getattr(denoise, "residual_variance", None)
        trajectory = []

        for t, t_prev in self.pairs(schedule):
            values = self.coefficients(t, t_prev, schedule)
            if known is not None and values.sigma > 0:
                c = values.towards_x_t - values.signal_prev * values.noise / values.signal
                variance = values.sigma**2 - c**2 * known(t)
                values = values._replace(sigma=max(variance, 0.0) ** 0.5)
            trajectory.append((t, values))
        return trajectory

    def coefficients(self, t: int, t_prev: int, schedule: Schedule) -> Coefficients:
        """Return the numbers of one update."""
        abar = float(schedule.alphas_cumprod[t])
        last = 1.0 if self.final_alpha_one else float(schedule.alphas_cumprod[0])
        abar_prev = float(schedule.alphas_cumprod[t_prev]) if t_prev >= 0 else last

        variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        sigma = self.eta * max(variance, 0.0) ** 0.5
        towards_x_t = max(1 - abar_prev - sigma**2, 0.0) ** 0.5
        return Coefficients(abar**0.5, (1 - abar) ** 0.5, abar_prev**0.5, towards_x_t, sigma)

    def update(
        self, eps: Tensor, x: Tensor, values: Coefficients | Sequence[Tensor], z: Tensor | None
    ) -> Tensor:
        """Return x_{t_prev}.

        Args:
            eps: eps_hat, of x's shape.
            x: x_t.
            values: of `coefficients`, or the same as 0-dim tensors.
            z: standard normal, of x's shape; None where sigma is 0.
        """
        signal, noise, signal_prev, towards_x_t, sigma = values

        x_0 = (x - noise * eps) / signal
        if self.clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - signal * x_0) / noise

        x = signal_prev * x_0 + towards_x_t * eps
        return x if z is None else x + sigma * z

    def noise(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return z of one update, drawn on the CPU, one generator for each sample.

        Raises:
            ValueError: if there is not one generator for each sample.
        """
        if len(generators) != len(x):
            raise ValueError("eta > 0 needs one generator per sample")
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)


def as_table(trajectory: Sequence[tuple[int, Coefficients]], x: Tensor) -> Tensor:
    """Return the numbers of a trajectory, `[S, 5]`, in x's type and on its device."""
    numbers = [tuple(values) for _, values in trajectory]
    return torch.tensor(numbers, dtype=torch.float64).to(x.device, x.dtype)
