"""Options of the stages after the fit: sampling and measuring. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tdq_exp.config.setting import SEED, setting
from tdq_exp.diffusion.options import TrajectoryOptions

ENGINES = ("fake", "integer")
MOST_IMAGES = 10**7
MOST_BATCH = 10**5


@dataclass
class SamplerOptions(TrajectoryOptions):
    """Sampling of a set of images.

    `method` is the sampler as it is made: its class, and its arguments, which
    `configs/sampler/shared/steps.yaml` takes from the group, so that a command line says
    `sampler.eta=1`. The fingerprint reads `method`.
    """

    label: str = setting(fingerprint=False, is_name=True)
    method: Any = setting(help="_target_: the sampler's class")
    images: int = setting(low=1, most=MOST_IMAGES, help="how many images")
    batch: int = setting(low=1, most=MOST_BATCH, help="images that are computed together")
    seed: int = setting(0, low=0, high=SEED, help="seed of the images' starting noise")
    truncate: bool = setting(False, help="truncate pixel values instead of rounding them")
    engine: str = setting("fake", choices=ENGINES, help="fake (simulated quantization) or integer")
    min_speedup: float = setting(
        1.0, low=0, most=1e6, since=1.0, help="integer engine: least speedup of a layer to use it"
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
        help="use only the first N images of the training set; null uses all",
    )
