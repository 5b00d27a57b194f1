"""What every stage knows of a model: enough to train, quantize, sample and decode it, and nothing of its kind.

A third model is one file like this one's `DiffusionModel`, or just one config: no stage asks what a model is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

from tdq_exp.data.images import Images
from tdq_exp.diffusion.objective import LOSSES, Samples, noise_prediction_loss
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.attention import quantize_attention
from tdq_exp.models.roles import unet_roles
from tdq_exp.models.weights.load import load_weights
from tdq_exp.quant.convert import Recipe, quantize
from tdq_exp.quant.roles import Role
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes


class DiffusionModel:
    """A pixel-space diffusion model with diffusers' `UNet2DModel`, which is configured, never forked.

    Args:
        network: arguments of `UNet2DModel`.
        schedule: T and the betas.
        loss: `l2` or `l1`, as the model was (or is to be) trained.
        flip: mirror training images?
        attention_heads: of every attention, whatever its width; None leaves what the network's `attention_head_dim`
            says, which is one width of a head for all of them.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        schedule: Schedule,
        loss: str = "l2",
        flip: bool = True,
        attention_heads: int | None = None,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"model.definition.loss={loss}: choose one of {', '.join(LOSSES)}")
        if attention_heads is not None and not (isinstance(attention_heads, int) and attention_heads > 0):
            raise ValueError(f"model.definition.attention_heads={attention_heads}: must be an integer of at least 1")
        self.network, self.schedule, self.loss, self.flip = dict(network), schedule, loss, flip
        self.attention_heads = attention_heads

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return int(self.network["sample_size"])

    @property
    def channels(self) -> int:
        """Of an image: 1 or 3."""
        return int(self.network["in_channels"])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        return int(self.network["in_channels"]), int(self.network["sample_size"]), int(self.network["sample_size"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_0, as `training_loss` takes it."""
        return self.sample_shape

    @property
    def steps(self) -> int:
        """T."""
        return self.schedule.steps

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights, a function of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = UNet2DModel(**self.network)
        if self.attention_heads is not None:
            set_heads(net, self.attention_heads)
        return net

    def load(self, net: nn.Module, weights: str, ema: bool = True) -> str:
        """Fills the network; returns the content hash of what was loaded. See `checkpoints.load_weights`."""
        if self.attention_heads is None:
            return load_weights(net, weights, ema=ema)
        set_heads(net, self.attention_heads)  # a network that came from elsewhere has what its config could say
        return load_weights(net, weights, ema=ema, overruled={"attention_head_dim"})

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """eps_hat for x_t, `[B, C, H, W]`; t is `[B]`, or 0-dim for a batch at one time step."""
        return net(x_t, t, return_dict=False)[0]

    def training_loss(self, net: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noise-prediction loss of a batch: x_0 and eps `[B, C, H, W]`, t `[B]`."""
        eps_hat = self.predict(net, self.schedule.add_noise(x_0, eps, t), t)
        return noise_prediction_loss(eps_hat, eps, self.loss)

    def roles(self, net: nn.Module) -> dict[str, Role]:
        """What each convolution and linear layer is for."""
        return unet_roles(net)

    def quantize(self, net: nn.Module, recipe: Recipe) -> TimeContext:
        """Quantize a float network of this model in place; see `tdq_exp.quant.quantize`."""
        return quantize(net, self.roles(net), recipe, self.steps, quantize_attention)

    def part(self, name: str) -> Trainable:
        """What `fit.part` trains: `network` is this model itself.

        Raises:
            ValueError: for a part that it does not have.
        """
        if name == "network":
            return self
        raise ValueError(f"fit.part={name}: this model has no such part")

    def attach(self, autoencoder: str | None) -> None:
        """Says where the weights of the model's autoencoder are, which has none.

        Raises:
            ValueError: if there are any.
        """
        if autoencoder is not None:
            raise ValueError(f"model.autoencoder={autoencoder}: this model has none")

    def parts(self) -> dict[str, str]:
        """For fingerprints: hashes of what its samples and images depend on beside the network. Here nothing."""
        return {}

    def samples(self, images: Images, *, mirror: bool, cache: Path, processes: Processes) -> Samples:
        """A set of images as the x_0 that the network is trained on. Here the same thing.

        Args:
            images: in pixels.
            mirror: will mirrored ones be asked for?
            cache: folder in which what takes long is kept between runs.
            processes: who shares the work.
        """
        return images

    def settle(self, net: nn.Module, samples: Samples, device: torch.device) -> None:
        """Called after training, with the net that is kept. Nothing is left to do."""

    def shown(self, net: nn.Module, held_out: Samples) -> dict[str, NDArray[np.uint8]]:
        """Pictures of what a trained net does, for `figures.sample_grid`. Here none: its samples are the picture."""
        return {}

    def decode(self, x_0: Tensor) -> Tensor:
        """What the network denoises, `[B, *sample_shape]` -> images in [-1, 1], `[B, C, H, W]`. Here the same thing."""
        return x_0

    def codec(self) -> Codec | None:
        """What images pass on their way to x_0 and back, with random weights: to be timed. Here nothing."""
        return None

    @property
    def codec_fingerprint(self) -> str:
        """Of all that says how images become x_0 and images again: what was encoded is cached by it. Here empty."""
        return ""

    @property
    def lossy(self) -> bool:
        """Does an image lose anything on its way to x_0 and back?"""
        return False

    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images in [-1, 1] -> x_0 -> images: what a perfect denoiser would give. Here the same thing.

        Args:
            images: `[B, C, H, W]`.
            noise: `[B, *sample_shape]`, standard normal, for a model that draws x_0.
        """
        return images


class Codec(Protocol):
    """A module with two directions."""

    def to(self, device: torch.device) -> Any: ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, x_0: Tensor) -> Tensor: ...


class Trainable(Protocol):
    """A network with a description: what `fit=pretrain` knows of what it trains. `DiffusionModel` says what each is."""

    @property
    def sample_shape(self) -> tuple[int, int, int]: ...

    @property
    def input_shape(self) -> tuple[int, int, int]: ...

    @property
    def steps(self) -> int: ...

    @property
    def flip(self) -> bool: ...

    def build(self, seed: int = 0) -> nn.Module: ...

    def training_loss(self, net: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor: ...

    def parts(self) -> dict[str, str]: ...

    def samples(self, images: Images, *, mirror: bool, cache: Path, processes: Processes) -> Samples: ...

    def settle(self, net: nn.Module, samples: Samples, device: torch.device) -> None: ...

    def shown(self, net: nn.Module, held_out: Samples) -> dict[str, NDArray[np.uint8]]: ...


def set_heads(net: nn.Module, heads: int) -> None:
    """Divides every attention of a network into so many heads: h of width C / h, `scale = 1 / sqrt(C / h)`.

    No parameter shows the number of heads, and diffusers' config can't say it, so saving a network loses it.

    Raises:
        ValueError: if a width does not divide.
    """
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            width = module.inner_dim
            if width % heads:
                raise ValueError(f"model.definition.attention_heads={heads}: does not divide {name}'s {width} channels")
            module.heads = module.sliceable_head_dim = heads
            module.scale = (width // heads) ** -0.5
