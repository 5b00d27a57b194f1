"""The noise-prediction objective, and the draws that it is evaluated on.

    L = E_{x_0, t, eps} | eps - eps_theta(x_t, t) |^p,   p = 2 (DDPM) or 1 (LDM as released)

Every draw is a pure function of (seed, update, position in the global batch), so a run that is resumed, or shared by
several processes, sees exactly the draws of one that ran alone without a break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdq_exp.diffusion.schedule import Schedule

LOSSES = ("l2", "l1")


class Denoiser(Protocol):
    """Predicts the noise in x_t."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...


class Samples(Protocol):
    """A training set, as what the network denoises: for each image an x_0, or a distribution of it."""

    @property
    def content(self) -> str:
        """Hash of what the samples are."""
        ...

    @property
    def random(self) -> bool:
        """Is each sample a distribution, of which every batch draws anew?"""
        ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_0 of some samples, `[B, C, H, W]`, those with `flip` of the mirrored image.

        Args:
            index: `[B]`, int64.
            flip: `[B]`, bool.
            noise: `[B, C, H, W]`, standard normal; where samples are random, what they are drawn with.
        """
        ...


def noise_prediction_loss(eps_hat: Tensor, eps: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all elements of `|eps - eps_hat|^p`; scalar, float32.

    Raises:
        ValueError: for a kind that is neither `l1` nor `l2`.
    """
    difference = eps_hat.float() - eps
    if kind == "l2":
        return difference.square().mean()
    if kind == "l1":
        return difference.abs().mean()
    raise ValueError(f"loss={kind!r}: choose one of {', '.join(LOSSES)}")


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a well mixed function of all the integers of `key`."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64: neighbouring keys give unrelated streams
        state = (state + (part & (2**64 - 1)) + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator().manual_seed(state & (2**63 - 1))


def share_of(batch: int, rank: int, world: int) -> slice:
    """The part of a global batch that process `rank` of `world` works on.

    Raises:
        ValueError: if the batch can't be divided evenly, for then gradients would not average to the batch's mean.
    """
    if batch % world:
        raise ValueError(f"fit.batch_size={batch} does not divide by the number of processes ({world})")
    return slice(rank * batch // world, (rank + 1) * batch // world)


@dataclass(frozen=True)
class Draws:
    """What one update needs besides the images themselves. All of length B, on the CPU."""

    index: Tensor  # [B] which training image, int64
    flip: Tensor  # [B] mirror it?, bool
    t: Tensor  # [B] time step, int64
    eps: Tensor  # [B, C, H, W] standard normal
    noise: Tensor | None = None  # [B, C, H, W] standard normal, for samples that are random

    def of(self, part: slice) -> Draws:
        """Those of a part of the batch."""
        noise = None if self.noise is None else self.noise[part]
        return Draws(self.index[part], self.flip[part], self.t[part], self.eps[part], noise)

    def shard(self, rank: int, world: int) -> Draws:
        """The part of this batch that process `rank` of `world` works on: a consecutive slice.

        Raises:
            ValueError: see `share_of`.
        """
        return self.of(share_of(len(self.t), rank, world))


def draw_batch(
    seed: int, update: int, *, batch_size: int, images: int, shape: tuple[int, ...], steps: int, flip: bool,
    random: bool = False,
) -> Draws:  # fmt: skip
    """The draws of one update.

    Images are visited in a new permutation every epoch; t is uniform over 0..T-1.

    Args:
        seed: the fit's seed.
        update: index of the update, from 0.
        batch_size: the *global* batch.
        images: size of the training set.
        shape: of one sample, `(C, H, W)`.
        steps: T.
        flip: mirror half of the images?
        random: draw noise for the samples, too? After all else, so that the rest is the same numbers without it.

    Raises:
        ValueError: if the training set is smaller than a batch.
    """
    if images < batch_size:
        raise ValueError(f"fit.batch_size={batch_size} is larger than the training set ({images} images)")
    position = torch.arange(update * batch_size, (update + 1) * batch_size)
    epochs = position // images
    index = torch.empty_like(position)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):  # a batch may span the border of two epochs
        order = torch.randperm(images, generator=generator(seed, 1, epoch))
        index[epochs == epoch] = order[position[epochs == epoch] % images]
    g = generator(seed, 2, update)
    t = torch.randint(steps, (batch_size,), generator=g)
    mirrored = torch.rand(batch_size, generator=g) < (0.5 if flip else 0.0)
    eps = torch.randn(batch_size, *shape, generator=g)
    return Draws(index, mirrored, t, eps, torch.randn(batch_size, *shape, generator=g) if random else None)


def fixed_draws(
    seed: int, *, samples: int, images: int, shape: tuple[int, ...], steps: int, random: bool = False
) -> Draws:
    """Draws that cover all of time evenly, for validation and calibration: t is stratified, nothing is mirrored.

    Sample i has t = floor((i + u_i) T / samples), so any 1,000 samples see every tenth of the time steps alike; images
    repeat only if there are fewer than samples.
    """
    g = generator(seed, 3)
    strata = torch.rand(samples, generator=g, dtype=torch.float64)
    t = ((torch.arange(samples) + strata) * steps / samples).long().clamp_(max=steps - 1)
    t = t[torch.randperm(samples, generator=g)]
    repeats = -(-samples // images)
    index = torch.cat([torch.randperm(images, generator=g) for _ in range(repeats)])[:samples]
    eps = torch.randn(samples, *shape, generator=g)
    noise = torch.randn(samples, *shape, generator=g) if random else None
    return Draws(index, torch.zeros(samples, dtype=torch.bool), t, eps, noise)


__all__ = [
    "LOSSES", "Denoiser", "Draws", "Samples", "Schedule", "draw_batch", "fixed_draws", "generator",
    "noise_prediction_loss",
]  # fmt: skip
