"""Which noise starts which image: one seed per image, images in fixed groups.

A group is `batch` consecutive image indices; the last one is padded with indices past the end, whose results are
dropped. Shards and resumes cut at group borders only, so every image is always computed in the same batch, and the set
is the same bits for any number of processes, any order, and any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def groups(images: int, batch: int) -> Iterator[tuple[int, range]]:
    """(index of the group, image indices in it, padding included)."""
    for number in range(-(-images // batch)):
        yield number, range(number * batch, (number + 1) * batch)


def image_generators(seed: int, indices: range) -> list[torch.Generator]:
    """One generator per image, keyed by (seed, image index): the same image for any batch that it is part of."""
    return [generator(seed, 4, index) for index in indices]


def starting_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """x_T, `[B, *shape]`, standard normal, drawn on the CPU so that every device starts from the same numbers."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


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
