"""Groups of the configuration that belong to no single component: model, data, bits, rules, ...

Nodes of type `Any` hold a `_target_`: their keys are checked by the constructor that they name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tdq_exp.config.setting import FEWEST_BITS, MOST_BITS, setting
from tdq_exp.diffusion.options import ModelConventions
from tdq_exp.experiment.options import MOST_BATCH, MOST_IMAGES
from tdq_exp.fit.options import MOST_SAMPLES, PtqNumbers, QatNumbers, TrainOptions


@dataclass
class ModelConfig:
    """The network and its schedule, where its weights come from, and how it is sampled."""

    label: str = setting(fingerprint=False, is_name=True)
    definition: Any = setting(help="_target_: a class like tdq_exp.models.DiffusionModel")
    weights: str | None = setting(
        None,
        fingerprint=False,
        help="safetensors, .ckpt, diffusers folder, hub id, or shipped:NAME",
    )
    ema: bool = setting(True, fingerprint=False, help="prefer EMA weights if the source has both")
    autoencoder: str | None = setting(
        None, fingerprint=False, help="weights of a latent model's first stage, as `weights`"
    )
    sampling: ModelConventions = field(
        default_factory=ModelConventions, metadata={"fingerprint": False}
    )


@dataclass
class DataConfig:
    """Where images come from, and where they are kept once decoded."""

    label: str = setting("", fingerprint=False, is_name=True)
    source: Any = setting(help="_target_: where images come from", fingerprint=False)
    cache: str | None = setting(None, fingerprint=False, help="default: ~/.cache/tdq_exp")
    limit: int | None = setting(
        None,
        low=1,
        most=MOST_IMAGES,
        fingerprint=False,
        help="only the first so many images of each split",
    )


@dataclass
class PtqProtocol(PtqNumbers):
    """Numbers of post-training quantization: its updates, and its calibration set."""

    samples: int = setting(0, low=1, most=MOST_SAMPLES, help="size of a calibration set")
    images: int = setting(
        0, low=1, most=MOST_SAMPLES, help="trajectories of a set with several steps of each"
    )
    ndtc_images: int = setting(
        0, low=1, most=MOST_SAMPLES, help="trajectories of a set with PTQ4DM's distribution of t"
    )
    steps: int = setting(0, low=1, help="sampling steps after post-training quantization")


@dataclass
class SamplingNumbers:
    """How many images a run draws, in how many steps, in groups of what size."""

    images: int = setting(low=1, most=MOST_IMAGES, help="how many images")
    steps: int = setting(low=1, help="sampling steps, but for post-training quantization")
    batch: int = setting(low=1, most=MOST_BATCH, help="images that are computed together")


@dataclass
class Protocol:
    """The numbers of an experiment at one scale; the groups `fit` and `sampler` read them."""

    scale: str = setting(is_name=True, help="paper, small, digits, tiny")
    pretrain: TrainOptions = field(default_factory=TrainOptions)
    autoencoder: TrainOptions = field(default_factory=TrainOptions)
    qat: QatNumbers = field(default_factory=QatNumbers)
    ptq: PtqProtocol = field(default_factory=PtqProtocol)
    sampling: SamplingNumbers = field(default_factory=SamplingNumbers)


@dataclass
class BitsConfig:
    """Numbers of bits of weights and of activations."""

    label: str = setting(fingerprint=False, is_name=True)
    weight: int = setting(low=FEWEST_BITS, high=MOST_BITS, help="bits of weights")
    act: int = setting(low=FEWEST_BITS, high=MOST_BITS, help="bits of activations")


@dataclass
class ActConfig:
    """The rule of activations, or null."""

    label: str = setting("", fingerprint=False, is_name=True)
    quantizer: Any = setting(None, help="_target_: the rule's class; null for a float model")


@dataclass
class WeightConfig:
    """The rule of weights, or null, and where their step sizes come from."""

    label: str = setting("", fingerprint=False, is_name=True)
    quantizer: Any = setting(None, help="_target_: the rule's class; null for a float model")
    interval: str = setting("static", help="static, max_abs or channel_range")


@dataclass
class TdqConfig:
    """The step size and the zero point of activations."""

    label: str = setting("", fingerprint=False, is_name=True)
    interval: Any = setting(help="_target_: where activations' step sizes come from")
    zero_point: str = setting("by_role", help="static, lower_bound, by_role")


@dataclass
class PlanConfig:
    """Which layers are quantized, and at how many bits."""

    label: str = setting("", fingerprint=False, is_name=True)
    plan: Any = setting(help="_target_: which layers are quantized, and at how many bits")


@dataclass
class HabitsConfig:
    """Whether details follow the paper's text or its released code."""

    label: str = setting("", fingerprint=False, is_name=True)
    habits: Any = setting(help="_target_: details of the paper's text or of its code")


@dataclass
class MethodConfig:
    """A method: what its name stands for."""

    label: str = setting(fingerprint=False, is_name=True)
    quantized: bool = setting(True, fingerprint=False, help="false for a float model")
    calibration: str = setting(
        "", fingerprint=False, help="label of the method's default set, left out of run names"
    )
