"""Options of the stages after the fit: sampling and measuring. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tdq_exp.config.setting import SEED, setting

ENGINES = ("fake", "integer")
MOST_IMAGES = 10**7
MOST_BATCH = 10**5


@dataclass
class SamplerOptions:
    """Sampling of a set of images.

    `method` names the sampler's class and holds the time steps; its own keys repeat those of the
    group, so that a command line says `sampler.eta=1`. The fingerprint reads `method`.
    """

    label: str = setting(fingerprint=False, is_name=True)
    method: Any = setting(help="_target_: the sampler's class")
    steps: int = setting(low=1, fingerprint=False, help="S")
    spacing: str = setting("leading", fingerprint=False, help="leading, trailing, linspace, quad")
    eta: float = setting(
        0.0, low=0, high=1, fingerprint=False, help="0 is deterministic, 1 has DDPM's variance"
    )
    clip: bool = setting(False, fingerprint=False, help="limit x0_hat to [-1, 1]")
    offset: int = setting(0, fingerprint=False, help="added to every time step")
    final_alpha_one: bool = setting(True, fingerprint=False, help="abar after the last step is 1")
    images: int = setting(low=1, most=MOST_IMAGES, help="how many images")
    batch: int = setting(low=1, most=MOST_BATCH, help="images that are computed together")
    seed: int = setting(0, low=0, high=SEED, help="of the images' starting noise")
    truncate: bool = setting(False, help="drop the fraction of a pixel in place of rounding")
    engine: str = setting("fake", choices=ENGINES, help="fake (simulated quantization) or integer")
    min_speedup: float = setting(
        1.0, low=0, most=1e6, since=1.0, help="integer: least gain of a layer that runs on integers"
    )
    png: bool = setting(False, fingerprint=False, help="also write every image as a PNG")


@dataclass
class EvalOptions:
    """Measuring of a set of images."""

    label: str = setting(fingerprint=False, is_name=True)
    features: Any = setting(help="_target_: the feature network")
    metrics: list[str] = setting(
        ["fid", "isc", "kid"], help="names of the registry in `metrics.fidelity`"
    )
    batch: int = setting(
        50, low=1, most=MOST_BATCH, help="images that pass the feature network together"
    )
    reference_images: int | None = setting(
        None,
        low=1,
        most=MOST_IMAGES,
        help="the first so many of the training set; all of them if null",
    )
