"""Random draws: named streams, draws that are pure functions of their key, images in fixed groups.

Every draw has a key, `(seed, stream, index, ...)`, and a generator of its own, so a run that is
resumed, or shared by several processes, sees exactly the draws of one that ran alone without a
break. `Stream` names what is drawn; no arithmetic is done on seeds. `BareSeed` lists the draws that
have no stream, and why.

Images are computed in groups of `batch` consecutive indices. The last group is padded with indices
past the end, whose results are dropped. Shards and resumes cut at group borders only, so every
image is always computed in the same batch, and a set is the same bits for any number of processes,
any order, and any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are drawn for. Two streams share no key, at any two seeds.

    The values are part of the key of every draw: changing one changes results. 3 is taken (see
    `RECORDED_KEYS`).
    """

    EPOCH = 1  # order of the training images: (seed, EPOCH, epoch)
    UPDATE = 2  # t, eps and flips of one training update: (seed, UPDATE, update)
    IMAGE = 4  # noise of one sampled image: (seed, IMAGE, image)
    CALIBRATION_TIMES = 5  # t of one trajectory of a calibration set: (seed, ..., trajectory)
    BLOCK_BATCH = 6  # samples of one update of a block: (seed, ..., block, phase, update)
    FORWARD_IMAGES = 7  # order of the images of a `forward` calibration set: (seed, ...)
    FORWARD_NOISE = 8  # eps of one image of a `forward` calibration set: (seed, ..., image)
    TRAJECTORY = 9  # noise of one trajectory of a calibration set: (seed, ..., trajectory)
    OVER_TIME_BATCH = 10  # samples of one update of the fit over time: (seed, ..., update)
    FORWARD_LATENTS = 11  # latents of one image of a `forward` calibration set: (seed, ..., image)
    RECONSTRUCTION = 12  # latents of one reconstructed reference image: (seed, ..., image)
    VALIDATION = 13  # the draws on which validation loss is computed: (seed, ...)
    CALIBRATION = 14  # the draws on which start values are computed: (seed, ...)
    FORWARD_TIMES = 15  # t of a `forward` calibration set: (seed, ...)
    PREVIEW = 16  # latents of an autoencoder's preview images: (seed, ...)
    EXPORT_RANGE = 17  # noise of one image on which an exported graph's ranges are computed
    TRAINING_NOISE = 18  # global generator while training: dropout, NIPQ: (seed, ..., rank)
    BLOCK_NOISE = 19  # global generator while a block is reconstructed: (seed, ..., block, rank)
    OVER_TIME_NOISE = 20  # global generator during the fit over time: (seed, ...)
    CONDITION = 21  # condition of one sampled image: (seed, ..., stream of its noise, image)
    CORRECTION = 22  # the draws on which a correction of the prediction is measured: (seed, ...)


# Committed rows of seed 0 were drawn with these keys. They stay, so that the rows can be made
# again; every other seed has the key (seed, stream).
RECORDED_KEYS: dict[tuple[int, Stream], tuple[int, ...]] = {
    (0, Stream.VALIDATION): (1, 3),
    (0, Stream.CALIBRATION): (2, 3),
    (0, Stream.FORWARD_TIMES): (4, 3),
}


def generator(seed: int, stream: Stream, *index: int) -> torch.Generator:
    """Return the CPU generator of one key, `(seed, stream, *index)`."""
    key = RECORDED_KEYS.get((seed, stream), (seed, int(stream)))
    return torch.Generator().manual_seed(mix(*key, *index))


def seed_global(seed: int, stream: Stream, *index: int) -> None:
    """Seed torch's global generators, for layers that draw their own noise (dropout, NIPQ)."""
    if seed == 0 and stream == Stream.TRAINING_NOISE:
        (state,) = index  # committed rows of seed 0 were trained so: the rank alone
    else:
        state = mix(seed, int(stream), *index)
    torch.manual_seed(state)


class BareSeed(Enum):
    """Draws whose seed is a bare number, and no key of a stream; each with the reason.

    All of them are older than the names of streams. Whatever is drawn anew gets a `Stream`.
    """

    START_WEIGHTS = (
        "start weights of a float network, by the run's seed: shipped nets were trained from them,"
        " and whoever builds a network for its shapes draws them, too"
    )
    GENERATOR_START = (
        "start weights of TDQ's networks f, by the run's seed: every committed fit with TDQ began"
        " with them"
    )
    CALIBRATION_VALUES = (
        "which values of a tensor are kept while calibrating, by the number of the batch: start"
        " values of every committed fit follow from them; drawn in `quant.calibrate`, which knows"
        " nothing of diffusion"
    )
    OVER_TIME_VALUES = (
        "which values of a tensor the fit over time keeps, by the number of the batch: committed"
        " rows of MinMax + TDQ were fitted to them"
    )
    HALF_SAMPLING = (
        "halves of a set in `metrics.half_sampling`, by its own constant: the deviations that"
        " committed rows state"
    )
    EXPORT_PARITY = (
        "the input on which an exported graph is compared with the network, by 0: what `export`"
        " prints stays the same from version to version; no result depends on it"
    )


def bare_generator(draw: BareSeed, seed: int) -> torch.Generator:
    """Return the CPU generator of a draw that is listed as an exception."""
    assert isinstance(draw, BareSeed)
    return torch.Generator().manual_seed(seed)


def seed_global_bare(draw: BareSeed, seed: int) -> None:
    """Seed torch's global generators for a draw that is listed as an exception."""
    assert isinstance(draw, BareSeed)
    torch.manual_seed(seed)


def mix(*key: int) -> int:
    """Return a 63-bit hash of all the integers of a key.

    One step of splitmix64 per integer: neighbouring keys give unrelated streams. torch's generator
    on the CPU reads the lower 32 bits of a seed, so that of n keys about n^2 / 2^33 pairs draw the
    same numbers: of 50,000 images 0.3 pairs on average, of a million 116.

    Source: Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators* (OOPSLA 2014).
    """
    mask = 2**64 - 1
    state = 0x9E3779B97F4A7C15

    for part in key:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31

    return state & (2**63 - 1)


def groups(images: int, batch: int) -> Iterator[tuple[int, range]]:
    """Yield (index of the group, image indices in it, padding included)."""
    for number in range(-(-images // batch)):
        yield number, range(number * batch, (number + 1) * batch)


def image_generators(
    seed: int, indices: range, stream: Stream = Stream.IMAGE
) -> list[torch.Generator]:
    """Return one generator per image, so that an image is the same in any batch it is part of."""
    return [generator(seed, stream, index) for index in indices]


def starting_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Return x_T, `[B, *shape]`, standard normal.

    It is drawn on the CPU, so that every device starts from the same numbers.
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def share_of(batch: int, rank: int, world: int) -> slice:
    """Return the part of a global batch that process `rank` of `world` works on.

    Raises:
        ValueError: if the batch can't be divided evenly, for then gradients would not average to
            the batch's mean.
    """
    if batch % world:
        raise ValueError(
            f"fit.batch_size={batch} does not divide by the number of processes ({world})"
        )
    return slice(rank * batch // world, (rank + 1) * batch // world)


def require_batch(batch: int, images: int, world: int = 1, micro_batches: int = 1) -> None:
    """Refuse a global batch that a training set does not fill, or that processes can't share.

    Args:
        batch: samples of one update, over all processes.
        images: size of the training set.
        world: number of processes.
        micro_batches: passes in which each computes its part.

    Raises:
        ValueError: naming the key.
    """
    if images < batch:
        raise ValueError(
            f"fit.batch_size={batch} is larger than the training set ({images} images)"
        )
    share = share_of(batch, 0, world)
    if share.stop % micro_batches:
        raise ValueError(
            f"launcher.micro_batches={micro_batches}: does not divide the {share.stop} samples"
            " that a process computes of each batch"
        )


@dataclass(frozen=True)
class Draws:
    """Random numbers of one update: which images, which t, which noise. On the CPU."""

    index: Tensor  # [B] which training image, int64
    flip: Tensor  # [B] whether it is mirrored, bool
    t: Tensor  # [B] time step, int64
    eps: Tensor  # [B, C, H, W] standard normal
    noise: Tensor | None = None  # [B, C, H, W] standard normal, for samples that are random

    def of(self, part: slice) -> Draws:
        """Return those of a part of the batch."""
        noise = None if self.noise is None else self.noise[part]
        return Draws(self.index[part], self.flip[part], self.t[part], self.eps[part], noise)

    def shard(self, rank: int, world: int) -> Draws:
        """Return the part of this batch that process `rank` of `world` works on, a slice.

        Raises:
            ValueError: see `share_of`.
        """
        return self.of(share_of(len(self.t), rank, world))


def draw_batch(
    seed: int,
    update: int,
    *,
    batch_size: int,
    images: int,
    shape: tuple[int, ...],
    steps: int,
    flip: bool,
    random: bool = False,
) -> Draws:
    """Return the draws of one update.

    Images are visited in a new permutation every epoch; t is uniform over 0..T-1.

    Args:
        seed: the fit's seed.
        update: index of the update, from 0.
        batch_size: the *global* batch.
        images: size of the training set.
        shape: of one sample, `(C, H, W)`.
        steps: T.
        flip: whether half of the images are mirrored.
        random: whether noise is drawn for the samples, too: after all else, so that the rest is the
            same numbers without it.

    Raises:
        ValueError: if the training set is smaller than a batch.
    """
    require_batch(batch_size, images)

    # Image indices: a batch may span the border of two epochs.
    position = torch.arange(update * batch_size, (update + 1) * batch_size)
    epochs = position // images
    index = torch.empty_like(position)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        order = torch.randperm(images, generator=generator(seed, Stream.EPOCH, epoch))
        index[epochs == epoch] = order[position[epochs == epoch] % images]

    # The rest, in this order.
    g = generator(seed, Stream.UPDATE, update)
    t = torch.randint(steps, (batch_size,), generator=g)
    mirrored = torch.rand(batch_size, generator=g) < (0.5 if flip else 0.0)
    eps = torch.randn(batch_size, *shape, generator=g)
    noise = torch.randn(batch_size, *shape, generator=g) if random else None

    return Draws(index, mirrored, t, eps, noise)


def fixed_draws(
    seed: int,
    stream: Stream,
    *,
    samples: int,
    images: int,
    shape: tuple[int, ...],
    steps: int,
    random: bool = False,
) -> Draws:
    """Return draws that cover all of time evenly, for validation and calibration.

    Sample i has t = floor((i + u_i) T / samples), in random order, so any 1,000 samples see every
    tenth of the time steps alike. Nothing is mirrored.

    Args:
        seed: the fit's, or the calibration set's.
        stream: what the draws are for.
        samples: number of draws.
        images: size of the set; images repeat only if there are fewer than samples.
        shape: of one sample, `(C, H, W)`.
        steps: T.
        random: also draw noise for the samples, after all else.
    """
    g = generator(seed, stream)
    strata = torch.rand(samples, generator=g, dtype=torch.float64)
    t = ((torch.arange(samples) + strata) * steps / samples).long().clamp_(max=steps - 1)
    t = t[torch.randperm(samples, generator=g)]
    repeats = -(-samples // images)
    index = torch.cat([torch.randperm(images, generator=g) for _ in range(repeats)])[:samples]
    eps = torch.randn(samples, *shape, generator=g)
    noise = torch.randn(samples, *shape, generator=g) if random else None
    return Draws(index, torch.zeros(samples, dtype=torch.bool), t, eps, noise)
