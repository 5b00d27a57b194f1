"""A training set in the latent space of an autoencoder: the distribution of x_0 of each image.

    x_0 = mean + deviation * noise,   noise ~ N(0, I), drawn anew at every step

Encoding takes longer than a training step, and is the same every time: mean and deviation are
computed once. On disk:

    moments.npy  float32 [N, M, 2, C, H, W]   M = 1: image, or 2: and its mirror; mean, deviation
    groups.npy   uint64                       which groups of images are finished, and CRC-32
    about.json                                what was encoded, by what

The folder is named after the content of the images and the fingerprint of the autoencoder, so that
neither is ever paired with another one's moments. LSUN-Churches, 4x32x32, with mirrors: 8.3 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdq_exp.data.arrays import Column, GroupedArrays, in_groups
from tdq_exp.data.completed import complete
from tdq_exp.data.images import Images, classes_at
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes

GROUP = 64  # images that are encoded, and resumed, at a time
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Latents:
    """A training set as distributions of x_0, read from disk.

    Args:
        folder: of the files.
        images: N.
        mirrors: M.
        shape: (C, H, W) of x_0.
        content: hash of images and autoencoder.
        labels: int64 `[N]`, class of each image, where a model is conditioned on it.

    Raises:
        ValueError: if the files are damaged, or another set's.
    """

    def __init__(
        self,
        folder: Path,
        images: int,
        mirrors: int,
        shape: tuple[int, int, int],
        content: str,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self.content, self.images, self.labels = content, images, labels
        moments = Column((images, mirrors, 2, *shape), np.float32, GROUP)
        self.arrays = GroupedArrays(
            folder,
            {"moments": moments},
            again="encode",
            elsewhere="data.cache",
            of=folder.name,  # the fingerprint of all that they depend on
        )
        self._moments: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return self.images

    @property
    def random(self) -> bool:
        """Whether a sample is a distribution: yes, each batch draws anew."""
        return True

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return `mean + deviation * noise`, `[B, C, H, W]`; with `flip`, of the mirrored image.

        Raises:
            ValueError: without noise, or for the mirror of an image whose mirror was not encoded.
        """
        if noise is None:
            raise ValueError("latents are drawn: a batch needs noise")
        if self._moments is None:
            self._moments = self.arrays.read("moments")
        mirrors = self._moments.shape[1]
        if mirrors == 1 and bool(flip.any()):
            raise ValueError(f"{self.arrays.folder}: mirrored images were not encoded")
        mean, deviation = torch.from_numpy(
            self._moments[index.numpy(), flip.long().numpy()]
        ).unbind(1)
        return mean + deviation * noise

    def condition(self, index: Tensor) -> Tensor | None:
        """Return the class of some images, `[B]`, int64; None without labels."""
        return classes_at(self.labels, index)


@torch.no_grad()
def encoded(
    images: Images,
    encode: Encode,
    shape: tuple[int, int, int],
    *,
    mirror: bool,
    by: str,
    cache: Path,
    processes: Processes,
) -> Latents:
    """Return the moments of a set of images: found, made, or continued after an interruption.

    Args:
        images: what to encode.
        encode: images in [-1, 1] on the processes' device -> mean and deviation of x_0, `[B,
            *shape]` each.
        shape: (C, H, W) of x_0.
        mirror: whether the mirrored images are encoded, too.
        by: fingerprint of the autoencoder, weights and architecture.
        cache: folder under which they are kept.
        processes: who shares the work.
    """
    parts = {
        "version": 1,
        "images": images.content,
        "autoencoder": by,
        "mirror": mirror,
        "shape": list(shape),
    }

    content = hashlib.sha256(f"{images.content}|{by}".encode()).hexdigest()[:16]
    folder = cache / "latents" / files.fingerprint(parts)
    found = Latents(folder, len(images), 1 + mirror, shape, content, images.labels)

    def begin() -> None:
        found.arrays.create()
        files.write_json(folder / "about.json", parts)

    def make(indices: range) -> dict[str, NDArray[np.float32]]:
        index, sides = torch.tensor(indices), []
        for side in range(1 + mirror):  # the image, and its mirror image if it is wanted
            batch = images.batch(index, torch.full((len(index),), bool(side)))
            moments = encode(batch.to(processes.device))
            sides.append(torch.stack([value.cpu() for value in moments], 1))
        return {"moments": torch.stack(sides, 1).numpy()}

    processes.decide(begin)
    title, making = "encoding images", "encoded images"
    batches = in_groups(len(images), GROUP)
    complete(found.arrays, batches, make, processes, title=title, making=making)
    return found
