"""Which noise starts which image: one seed per image, images in fixed groups.

A group is `batch` consecutive image indices; the last one is padded with indices past the end, whose results are
dropped. Shards and resumes cut at group borders only, so every image is always computed in the same batch, and the set
is the same bits for any number of processes, any order, and any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdq_exp.diffusion.objective import generator


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
