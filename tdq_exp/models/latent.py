"""Latent diffusion: a diffusion model of what an autoencoder makes of images. Its U-Net is quantized, the autoencoder never.

Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tdq_exp.data.images import Images
from tdq_exp.data.latents import encoded
from tdq_exp.diffusion.objective import Samples
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.codec import Autoencoder
from tdq_exp.models.pixel import Codec, DiffusionModel, Trainable
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes


class LatentDiffusionModel(DiffusionModel):
    """A diffusion model with diffusers' `UNet2DModel` in the latent space of an autoencoder.

    Args:
        network: arguments of `UNet2DModel`.
        autoencoder: the first stage.
        schedule: T and the betas.
        loss: `l1` as released, or `l2`.
        flip: mirror training images?
        attention_heads: of every attention of the U-Net; see `DiffusionModel`.

    Raises:
        ValueError: if the U-Net does not denoise what the autoencoder makes.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        autoencoder: Autoencoder,
        schedule: Schedule,
        loss: str = "l1",
        flip: bool = True,
        attention_heads: int | None = None,
    ) -> None:
        super().__init__(network, schedule, loss, flip, attention_heads)
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(f"model.definition.autoencoder={autoencoder}: a latent model needs one, with a _target_")
        self.autoencoder = autoencoder
        if self.sample_shape != autoencoder.sample_shape:
            raise ValueError(
                f"model.definition.network: denoises {self.sample_shape}, but the autoencoder makes"
                f" {autoencoder.sample_shape}"
            )

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self.autoencoder.image_size

    @property
    def channels(self) -> int:
        """Of an image: 1 or 3."""
        return self.autoencoder.channels

    def part(self, name: str) -> Trainable:
        """`network` or `autoencoder`; see `DiffusionModel.part`."""
        return self.autoencoder if name == "autoencoder" else super().part(name)

    def attach(self, autoencoder: str | None) -> None:
        """Says where the autoencoder's weights are; without them no image can be encoded or decoded."""
        if autoencoder is not None:
            self.autoencoder.attach(autoencoder)

    def parts(self) -> dict[str, str]:
        """For fingerprints: the hash of the autoencoder's weights."""
        return {"autoencoder": self.autoencoder.hash}

    def samples(self, images: Images, *, mirror: bool, cache: Path, processes: Processes) -> Samples:
        """Images as distributions of x_0, encoded on first use; see `data.latents`."""
        processes.decide(lambda: self.autoencoder.hash)  # a download, or a complaint, happens once
        return encoded(
            images, self.autoencoder.encode, self.sample_shape, mirror=mirror, by=self.codec_fingerprint, cache=cache,
            processes=processes,
        )  # fmt: skip

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] -> mean and deviation of x_0, `[B, *sample_shape]` each."""
        return self.autoencoder.encode(images)

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0, `[B, *sample_shape]` -> images in about [-1, 1], `[B, C, H, W]`; so many at a time as the autoencoder says."""
        return self.autoencoder.decode(x_0)

    def codec(self) -> Codec:
        """The autoencoder."""
        return self.autoencoder.build()

    @property
    def codec_fingerprint(self) -> str:
        """Weights and architecture of the autoencoder: the same weights mean another thing with other groups of a norm."""
        return files.fingerprint({"weights": self.autoencoder.hash, "network": self.autoencoder.network})

    @property
    def lossy(self) -> bool:
        """An autoencoder keeps what it can."""
        return True

    def reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images through one draw of x_0 each, which is what the network is trained to give."""
        mean, deviation = self.encode(images)
        return self.decode(mean + deviation * noise)
