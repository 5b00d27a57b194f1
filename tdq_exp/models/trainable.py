"""Contracts of models: what can be trained, and what turns images into x_0 and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tdq_exp.data.images import Images
from tdq_exp.diffusion.draws import Stream
from tdq_exp.diffusion.objective import Samples
from tdq_exp.runtime.processes import Processes


class Trainable(ABC):
    """The description of a network that `fit=pretrain` can train."""

    flip: bool  # whether training images are mirrored at random

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise of one training sample."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one training sample, as `training_loss` takes it."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Return T, the number of time steps."""

    @abstractmethod
    def build(self, seed: int = 0) -> nn.Module:
        """Return the network with random weights, a function of the seed alone."""

    @abstractmethod
    def training_loss(
        self,
        net: nn.Module,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch: x_0 and eps `[B, C, H, W]`, t `[B]`.

        Args:
            net: the network in training.
            x_0, t, eps: the batch.
            condition: of its samples, `[B, ...]`; None for an unconditional model.
        """

    def draw_condition(self, seed: int, stream: Stream, indices: range) -> Tensor | None:
        """Return what sampled images are conditioned on, `[B, ...]`, on the CPU.

        An image's condition is a function of its own key, `(seed, stream, index)`, so that it is
        the same in any batch. By default None: an unconditional model.

        Args:
            seed: of the set.
            stream: of the images' noise.
            indices: of the images.
        """
        return None

    def parts(self) -> dict[str, str]:
        """Return what its samples depend on beside the images, for fingerprints: hashes."""
        return {}

    def samples(
        self, images: Images, *, mirror: bool, cache: Path, processes: Processes
    ) -> Samples:
        """Return a set of images as what the network is trained on: by default the images.

        Args:
            images: in pixels.
            mirror: whether mirrored images will be asked for.
            cache: folder in which what takes long is kept between runs.
            processes: who shares the work.
        """
        return images

    def settle(  # noqa: B027  (a default, not a contract)
        self, net: nn.Module, samples: Samples, device: torch.device
    ) -> None:
        """Finish a trained network, in place: by default nothing is left to do.

        Args:
            net: the network that is kept.
            samples: the training set.
            device: of the network.
        """

    def shown(self, net: nn.Module, held_out: Samples) -> dict[str, NDArray[np.uint8]]:
        """Return preview images of a trained network, title -> images: by default none."""
        return {}


class Codec(Protocol):
    """What turns images into x_0 and back: the first stage of a latent model.

    A pixel-space model has none. `Autoencoder` is one.
    """

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""

    @property
    def hash(self) -> str:
        """Hash of the weights."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights and architecture, under which encoded images are cached."""

    def build(self, seed: int = 0) -> Any:
        """Return the network, which has `encode` and `decode`, with random weights."""

    def attach(self, source: str) -> None:
        """Name the weights' source."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of x_0, of images in [-1, 1]."""

    def decode(self, x_0: Tensor) -> Tensor:
        """Return images, in about [-1, 1], of x_0."""

    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return images through one draw of x_0 each."""
