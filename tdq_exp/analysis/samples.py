"""Images of several networks from the same noise (Figures 5 to 7)."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tdq_exp.experiment import sample_stage
from tdq_exp.experiment.build import Experiment
from tdq_exp.models.denoiser import Denoiser


def draw(job: Experiment, net: nn.Module, count: int) -> NDArray[np.uint8]:
    """Return the images of a row's first seeds, uint8 `[N, H, W, C]`.

    Args:
        job: of the network.
        net: the network.
        count: N.
    """
    return sample_stage.sample_group(
        Denoiser(net, job.model),
        job.sampler,
        range(count),
        seed=0,
        device=torch.device("cpu"),
        truncate=job.sampling.truncate,
    )


def strip(images: NDArray[np.uint8]) -> str:
    """Return images side by side as a PNG, in base64.

    Args:
        images: uint8 `[N, H, W, C]`.
    """
    count, height, width, channels = images.shape
    sheet = np.full((height, count * (width + 1) - 1, channels), 255, np.uint8)
    for number, image in enumerate(images):
        left = number * (width + 1)
        sheet[:, left : left + width] = image

    buffer = io.BytesIO()
    picture = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
