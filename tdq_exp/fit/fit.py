"""What a fit is: the protocol of `Load`, `Pretrain`, `Qat` and `Ptq`.

A stage asks a fit what it needs and what it depends on, and runs it; it never asks which one it is.
A new fit is one such class and its options, a line for each in the registry, and a file of
`configs/fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tdq_exp.config.setting import fingerprint_keys
from tdq_exp.data.images import Data, Images
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.options import FitOptions
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.trainable import Trainable
from tdq_exp.quant.convert import Recipe
from tdq_exp.runtime.context import RunContext

O_co = TypeVar("O_co", bound=FitOptions, covariant=True)


@dataclass(frozen=True)
class Subject:
    """What a fit works on.

    Args:
        model: the whole model; a fit may train a part of it.
        recipe: of the quantizers, or None for a float network.
        groups: the config groups `model`, `bits`, `weight`, `act`, `tdq`, `plan` and `habits` as
            parts of fingerprints.
        weights: content hash of the float weights, or None where they are trained.
        data: training and held-out images.
    """

    model: DiffusionModel
    recipe: Recipe | None
    groups: Mapping[str, Any]
    weights: str | None
    data: Data

    def samples(
        self, trained: Trainable, images: Images, context: RunContext, mirror: bool = False
    ) -> Samples:
        """Return images as what `trained` is fitted to.

        Args:
            trained: the model, or a part of it.
            images: in pixels.
            context: of the run.
            mirror: whether mirrored ones may be asked for.
        """
        mirror = mirror and trained.flip
        return trained.samples(
            images, mirror=mirror, cache=context.cache, processes=context.processes
        )

    def quantizers(self) -> dict[str, Any]:
        """Return what the quantizers are, as parts of a fingerprint."""
        return {group: value for group, value in self.groups.items() if group != "model"}


@dataclass(frozen=True)
class Work:
    """What a fit would take, for a plan.

    Args:
        forward_passes: of one image through the float network.
        disk_bytes: of what is written.
        text: for a reader, such as `qat, 300 updates of 128`.
    """

    forward_passes: float
    disk_bytes: int
    text: str


class Fit(Generic[O_co]):
    """How a network comes by its weights.

    Args:
        options: its numbers, and what it needs (see `FitOptions`).
    """

    def __init__(self, options: O_co) -> None:
        self.options = options

    def trained(self, model: DiffusionModel) -> Trainable:
        """Return what is fitted: the model, or a part of it.

        Raises:
            ValueError: if the model has no such part.
        """
        return model.part(self.options.part)

    @property
    def encodes_training_images(self) -> bool:
        """Whether training images are turned into what the network denoises."""
        return self.options.trains_on_images and self.options.fits_network

    def fingerprint_keys(self) -> dict[str, Any]:
        """Return the options that a result depends on."""
        values = {name: getattr(self.options, name) for name in vars(self.options)}
        return fingerprint_keys(type(self.options), values)

    def parts(self, subject: Subject, seed: int) -> dict[str, Any]:
        """Return what the result depends on, for its fingerprint."""
        trained = self.trained(subject.model)
        return {
            "weights": subject.weights,
            "model": {"definition": self.definition(subject)},
            **trained.parts(),
            "data": subject.data.parts(),
            "seed": seed,
            "fit": self.fingerprint_keys(),
        }

    def definition(self, subject: Subject) -> Any:
        """Return the plain definition of what is fitted, without the rest of the model."""
        whole = subject.groups["model"]["definition"]
        return whole if self.options.fits_network else whole[self.options.part]

    def run(
        self, context: RunContext, net: nn.Module | None, subject: Subject
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the fitted network, and the facts that its record states.

        Args:
            context: of the run.
            net: the float network with its weights, on the device; None where they are trained.
            subject: what the fit works on.
        """
        raise NotImplementedError(type(self).__name__)

    def require_files(self) -> None:
        """Refuse options that name a missing input file, or an output file that already exists.

        Raises:
            ValueError, OSError: one line that names the key.
        """

    def require_startable(self, subject: Subject, world: int, micro_batches: int = 1) -> None:
        """Refuse, before anything is computed or written, what would fail later.

        Args:
            subject: what the fit works on.
            world: number of processes.
            micro_batches: passes in which each computes its part of a training batch.

        Raises:
            ValueError: one line that names the key.
        """

    def export(self, folder: Path, record: dict[str, Any]) -> None:
        """Copy a finished result to where the options say.

        Args:
            folder: of the run.
            record: of the finished fit.
        """

    def network_file(self, folder: Path) -> Path:
        """Return where a finished fit keeps its network."""
        raise NotImplementedError(type(self).__name__)

    def finished(
        self, model: DiffusionModel, recipe: Recipe | None, folder: Path, device: torch.device
    ) -> nn.Module:
        """Return the network of a finished fit, read from its folder.

        Raises:
            FileNotFoundError, ValueError: if a file is missing, or is not of this fit.
        """
        raise NotImplementedError(type(self).__name__)

    def skeleton(self, model: DiffusionModel, recipe: Recipe | None) -> nn.Module:
        """Return a network with the right modules and any numbers, to be filled and baked.

        Raises:
            ValueError: if this fit gives no quantized network.
        """
        raise ValueError(f"fit.kind={self.options.kind}: gives no quantized network")

    def work(self, model: DiffusionModel, net: nn.Module, sampling_steps: int) -> Work | None:
        """Return what the fit would take, or None if it takes nothing.

        Args:
            model: the whole model.
            net: of what is fitted, with any weights.
            sampling_steps: of one trajectory.
        """
        return None
