"""Latent diffusion: a diffusion model of what an autoencoder makes of images.

Its U-Net is quantized, the autoencoder never is.

Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.codec import Autoencoder
from tdq_exp.models.pixel import DiffusionModel


class LatentDiffusionModel(DiffusionModel):
    """A diffusion model with diffusers' `UNet2DModel` in the latent space of an autoencoder.

    Args:
        network: arguments of `UNet2DModel`.
        autoencoder: the first stage.
        schedule: T and the betas.
        loss: `l1` as released, or `l2`.
        flip: whether to mirror training images.
        attention_heads: of every attention of the U-Net; see `DiffusionModel`.
        prediction_type: what the U-Net answers; see `DiffusionModel`.

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
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__(network, schedule, loss, flip, attention_heads, prediction_type)
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(
                f"model.definition.autoencoder={autoencoder}: a latent model needs one, with"
                " a _target_"
            )

        self.codec = self.autoencoder = autoencoder
        if self.sample_shape != autoencoder.sample_shape:
            raise ValueError(
                f"model.definition.network: denoises {self.sample_shape}, but the autoencoder makes"
                f" {autoencoder.sample_shape}"
            )
