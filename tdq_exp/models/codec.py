"""The first stage of latent diffusion: diffusers' `AutoencoderKL`, which has a normal posterior.

    q(z | image) = N(mean, deviation^2),   x_0 = scale z,   image_hat = decoder(x_0 / scale)

`scale` makes x_0 about as large as the noise. It belongs to the weights: a checkpoint records the
scale that its diffusion network was trained with, and our own training ends by setting it to one
over the standard deviation of z.

    loss = mean |image - image_hat| + kl_weight mean_z KL(q(z | image) || N(0, 1))

Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR 2022),
section 3.1; its perceptual and adversarial terms are left out of the loss, so it trains small
autoencoders only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from tdq_exp.config.setting import require
from tdq_exp.data.images import to_uint8
from tdq_exp.diffusion.draws import BareSeed, Stream, generator, seed_global_bare
from tdq_exp.diffusion.objective import Samples
from tdq_exp.models.trainable import Trainable
from tdq_exp.models.unet_arguments import MOST, check_network, constructed, require_memory
from tdq_exp.models.weights.fill import load_autoencoder, state_hash
from tdq_exp.runtime import files

NETWORK = "model.definition.autoencoder.network"

# Arguments of `AutoencoderKL` that would change what latents mean: none but these values is known.
_FIXED = {
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


class ScaledAutoencoder(nn.Module):
    """`AutoencoderKL` with its scale: weights `kl.*` and `scale`, 0-dim.

    Args:
        network: arguments of `AutoencoderKL`.
    """

    def __init__(self, network: Mapping[str, Any]) -> None:
        super().__init__()
        self.kl = AutoencoderKL(**network)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of z, `[B, c, h, w]` each; the latter within -30..20."""
        mean, log_variance = self.kl.quant_conv(self.kl.encoder(images)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of x_0, for images in [-1, 1]."""
        mean, log_variance = self.posterior(images)
        return self.scale * mean, self.scale * (log_variance / 2).exp()

    def decode(self, x_0: Tensor) -> Tensor:
        """Return images, in about [-1, 1], of x_0, `[B, c, h, w]`."""
        return self.kl.decoder(self.kl.post_quant_conv(x_0 / self.scale))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a reconstruction through one z, and the mean and log variance of z."""
        mean, log_variance = self.posterior(images)
        z = mean + (log_variance / 2).exp() * noise
        return self.kl.decoder(self.kl.post_quant_conv(z)), mean, log_variance


class Autoencoder(Trainable):
    """The description of an autoencoder, and its network once weights are attached.

    It is trained like any model.

    Args:
        network: arguments of `AutoencoderKL`.
        batch: images that are encoded, or latents that are decoded, at a time. It sets the memory.
        scale: in place of the source's, or of what training would end with.
        kl_weight: of the divergence, per element of z, beside the error per element of the image.
        flip: whether training images are mirrored at random.

    Raises:
        ValueError: naming the key.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        batch: int,
        scale: float | None = None,
        kl_weight: float = 1e-3,
        flip: bool = True,
    ) -> None:
        require("model.definition.autoencoder.batch", batch, int, low=1, most=MOST)
        if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(
                f"model.definition.autoencoder.scale={scale}: must be a positive number"
            )

        require("model.definition.autoencoder.kl_weight", kl_weight, float, low=0, most=1e6)
        check_network(network, AutoencoderKL, NETWORK)
        _check_latents(network)

        self.network, self.batch, self.scale, self.kl_weight, self.flip = (
            dict(network),
            batch,
            scale,
            kl_weight,
            flip,
        )

        self._source: str | None = None
        self._net: ScaledAutoencoder | None = None
        self._hash = ""

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return int(self.network["sample_size"])

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return int(self.network["in_channels"])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of z: every level but the last halves the image."""
        side = self.image_size // 2 ** (len(self.network["block_out_channels"]) - 1)
        return int(self.network["latent_channels"]), side, side

    @property
    def steps(self) -> int:
        """T: there is no time, so 1."""
        return 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.image_size, self.image_size

    def build(self, seed: int = 0) -> ScaledAutoencoder:
        """Return the network with random weights, a function of the seed alone."""
        require_memory(self.network, AutoencoderKL, NETWORK)

        with torch.random.fork_rng(devices=[]):
            seed_global_bare(BareSeed.START_WEIGHTS, seed)
            return constructed(lambda: ScaledAutoencoder(self.network), NETWORK)

    def training_loss(
        self,
        net: nn.Module,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch: x_0 are images, eps draws z, t and condition are not used."""
        image_hat, mean, log_variance = (value.float() for value in net(x_0, eps))
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return (x_0 - image_hat).abs().mean() + self.kl_weight * divergence

    @torch.no_grad()
    def settle(self, net: nn.Module, samples: Samples, device: torch.device) -> None:
        """Set the scale of a trained network, so that x_0 has the standard deviation 1.

            std^2 = mean(mean^2 + deviation^2) - mean(mean)^2

        over all elements of z of the first 10,000 images.
        """
        assert isinstance(net, ScaledAutoencoder)
        count, total, squares = 0, 0.0, 0.0
        net.scale.fill_(1)
        for start in range(0, min(len(samples), 10_000), self.batch):
            index = torch.arange(start, min(start + self.batch, len(samples), 10_000))
            mean, deviation = net.encode(
                samples.batch(index, torch.zeros(len(index), dtype=torch.bool)).to(device)
            )
            count, total = count + mean.numel(), total + float(mean.double().sum())
            squares += float((mean.double().square() + deviation.double().square()).sum())
        net.scale.fill_(self.scale or (squares / count - (total / count) ** 2) ** -0.5)

    @torch.no_grad()
    def shown(self, net: nn.Module, held_out: Samples) -> dict[str, NDArray[np.uint8]]:
        """Return some images, and below them their reconstructions through one draw of z."""
        index = torch.arange(min(len(held_out), 32))
        images = held_out.batch(index, torch.zeros(len(index), dtype=torch.bool))
        noise = torch.randn(len(index), *self.sample_shape, generator=generator(0, Stream.PREVIEW))
        device = next(net.parameters()).device
        parts = zip(images.split(self.batch), noise.split(self.batch), strict=True)
        back = torch.cat([net(x.to(device), draw.to(device))[0].cpu() for x, draw in parts])
        return {
            "held-out images": to_uint8(images).numpy(),
            "their reconstructions": to_uint8(back).numpy(),
        }

    def attach(self, source: str) -> None:
        """Name the weights' source (see `load_autoencoder`); it is read when first needed."""
        self._source, self._net = source, None

    def net(self, device: torch.device | None = None) -> ScaledAutoencoder:
        """Return the network with its weights, in eval mode, moved to a device if one is named.

        Raises:
            ValueError: if no weights were named, or they can't be read.
        """
        if self._net is None:
            if self._source is None:
                raise ValueError(
                    "model.autoencoder has no value: name a file, or train the autoencoder first"
                    " (method=fp fit=pretrain_autoencoder)"
                )
            net = ScaledAutoencoder(self.network)
            load_autoencoder(net, self._source, self.scale)
            self._net = net.eval().requires_grad_(False)
            self._hash = state_hash(net.state_dict())
        return self._net if device is None else self._net.to(device)

    @property
    def hash(self) -> str:
        """Hash of the weights, scale included."""
        self.net()
        return self._hash

    @property
    def fingerprint(self) -> str:
        """Hash of weights and architecture.

        The same weights mean something else with other groups of a norm.
        """
        return files.fingerprint({"weights": self.hash, "network": self.network})

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of x_0, `[B, c, h, w]` each; in bounded batches.

        Args:
            images: `[B, C, H, W]`, in [-1, 1].
        """
        parts = [self.net(images.device).encode(part) for part in images.split(self.batch)]
        mean, deviation = zip(*parts, strict=True)
        return torch.cat(mean), torch.cat(deviation)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Return images, `[B, C, H, W]`, of x_0, `[B, c, h, w]`; in bounded batches."""
        return torch.cat([self.net(x_0.device).decode(part) for part in x_0.split(self.batch)])

    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return images through one draw of x_0 each: what a perfect denoiser would give.

        Args:
            images: `[B, C, H, W]`, in [-1, 1].
            noise: `[B, c, h, w]`, standard normal.
        """
        mean, deviation = self.encode(images)
        return self.decode(mean + deviation * noise)


def _check_latents(network: Mapping[str, Any]) -> None:
    """Refuse an autoencoder whose latents or images mean something else than here.

    Raises:
        ValueError: naming the key.
    """
    for name, known in _FIXED.items():
        if network.get(name, known) != known:
            raise ValueError(
                f"{NETWORK}.{name}={network[name]}: latents are multiplied by one scale here, after"
                f" a 1x1 convolution; only {name}={known} is known"
            )

    # diffusers' default is 3, whatever the images have.
    if (out := network.get("out_channels", 3)) != network["in_channels"]:
        raise ValueError(
            f"{NETWORK}.out_channels={out}: an image comes back with the"
            f" {network['in_channels']} channels of in_channels"
        )

    halvings = len(network.get("block_out_channels", (64,))) - 1
    if network["sample_size"] % 2**halvings:
        raise ValueError(
            f"{NETWORK}.sample_size={network['sample_size']}: must be a multiple of {2**halvings},"
            f" as block_out_channels halve it {halvings} times"
        )
