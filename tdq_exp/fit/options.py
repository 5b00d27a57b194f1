"""Options of the fits: every number, declared once. Free of torch.

A protocol (`configs/protocol`) gives the numbers of `TrainOptions`, `QatNumbers` and `PtqNumbers`
for a scale; the options of a fit inherit them and add what does not depend on the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tdq_exp.config.setting import setting

BAKED = "baked.safetensors"  # a quantized network, in the folder of its run
NETWORK = "network"  # the part of a model that is fitted unless a pre-training names another

# A number beyond these is probably a typo.
MOST_RATE = 1000.0
MOST_UPDATES = 10**9
MOST_SAMPLES = 10**7


@dataclass
class FitOptions:
    """Options of every fit: its stable name, its label, and which checkpoint is measured.

    Attributes:
        needs_weights: starts from the weights of a float network.
        quantizes: gives a quantized network.
        needs_calibration_set: is shown a calibration set.
        trains_on_images: draws its batches from the training images.
        gives_rows: its network is sampled and measured.
        loads_only: computes nothing; the result is the float network.
        reconstructs: fits the network block by block.
        checkpoints: how many checkpoints of lowest validation loss are kept.
        part: part of the model that is fitted.
    """

    needs_weights: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    needs_calibration_set: ClassVar[bool] = False
    trains_on_images: ClassVar[bool] = False
    gives_rows: ClassVar[bool] = True
    loads_only: ClassVar[bool] = False
    checkpoints: ClassVar[int] = 0
    part: ClassVar[str] = NETWORK
    correction: ClassVar[str] = "none"

    kind: str = setting(help="stable name: none, pretrain, qat, ptq")
    label: str = setting("", fingerprint=False, is_name=True, help="label in the run's name")
    report: str = setting(
        "last",
        choices=("last", "best_of_5"),
        fingerprint=False,
        help="network to measure: the last, or the one of five checkpoints with the best distance",
    )

    @property
    def fits_network(self) -> bool:
        """Whether the model's network is fitted, and not another part of the model."""
        return self.part == NETWORK

    @property
    def chooses_checkpoint(self) -> bool:
        """Whether the row is that of the best of several checkpoints."""
        return self.report == "best_of_5"

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are reconstructed, one after another."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether the prediction is corrected after the fit."""
        return self.correction != "none"

    def check(self) -> None:
        """Refuse values that do not go together.

        Raises:
            ValueError: one line that names the key.
        """
        if self.chooses_checkpoint and not self.checkpoints:
            raise ValueError("fit.report=best_of_5 needs a fit with checkpoints (fit=qat)")


def _correction() -> Any:
    return setting(
        "none",
        choices=("none", "ptqd", "rescale"),
        since="none",
        named={"ptqd": "ptqd", "rescale": "rescaled"},
        help="correction of the predicted noise after the fit, by tables over t: none, ptqd (as"
        " published), or rescale (ours; networks of few bits predict too little noise)",
    )


@dataclass
class LoadOptions(FitOptions):
    """The weights as they were loaded."""

    loads_only: ClassVar[bool] = True

    kind: str = setting("none", choices=("none",), help="which fit: chosen by fit=none")


@dataclass
class TrainOptions:
    """Numbers of the training loop."""

    updates: int = setting(0, low=1, most=MOST_UPDATES, help="optimiser steps")
    batch_size: int = setting(1, low=1, most=MOST_SAMPLES, help="global, over all processes")
    lr: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of the weights after warm-up"
    )
    warmup: int = setting(
        0, low=0, most=MOST_UPDATES, help="updates over which the learning rates rise linearly"
    )
    lr_schedule: str = setting(
        "constant",
        choices=("constant", "cosine"),
        since="constant",
        help="after warm-up: constant, or a cosine towards 0",
    )
    ema_decay: float = setting(0.9999, low=0, below=1, help="decay of the average of the weights")
    grad_clip: float = setting(
        0.0, low=0, most=MOST_RATE, help="largest norm of the gradient; 0 does not clip"
    )
    validate_every: int = setting(
        1000, low=1, most=MOST_UPDATES, help="updates between validations and checkpoints"
    )
    validation_samples: int = setting(
        1024, low=1, most=MOST_SAMPLES, help="(x, t, eps) of the fixed validation set"
    )
    precision: str = setting(
        "float32",
        choices=("float32", "tf32", "bfloat16"),
        help="of matrix products: tf32 on GPUs, bfloat16 by autocast; quantizers keep float32",
    )
    stop_after: int = setting(
        0,
        low=0,
        most=MOST_UPDATES,
        fingerprint=False,
        help="stop after this many updates, as if killed (0: never); to test resuming",
    )

    def rate(self, update: int) -> float:
        """Return the share of the learning rates that an update (from 0) takes, in (0, 1].

        (u + 1) / warmup while warming up, so that the first update moves; then 1, or a cosine.
        """
        if update < self.warmup:
            return (update + 1) / self.warmup
        if self.lr_schedule == "constant":
            return 1.0
        return cosine(update - self.warmup, self.updates - self.warmup)


def learning_rates(options: TrainOptions) -> dict[str, float]:
    """Return the rates of a training that are not zero, by key: `fit.lr`, `fit.lr_step_size`."""
    names = [name for name in vars(options) if name == "lr" or name.startswith("lr_")]
    rates = {f"fit.{name}": getattr(options, name) for name in names}
    return {key: rate for key, rate in rates.items() if isinstance(rate, float) and rate}


def cosine(update: int, updates: int) -> float:
    """Return `(1 + cos(pi u / updates)) / 2`: from 1 at the first update towards 0."""
    return (1 + math.cos(math.pi * update / updates)) / 2


@dataclass
class QatNumbers(TrainOptions):
    """Numbers of quantization-aware training that a protocol gives."""

    lr_step_size: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of static and per-step step sizes"
    )
    lr_zero_point: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of zero points, in shares of the grid"
    )
    calibration_samples: int = setting(
        1024, low=1, most=MOST_SAMPLES, help="(x_t, t) that set the start values"
    )


@dataclass
class PretrainOptions(FitOptions, TrainOptions):
    """Float training from random weights."""

    needs_weights: ClassVar[bool] = False
    trains_on_images: ClassVar[bool] = True
    gives_rows: ClassVar[bool] = False

    kind: str = setting("pretrain", choices=("pretrain",), help="which fit: chosen by fit=pretrain")
    part: str = setting(  # type: ignore[misc]
        NETWORK, since=NETWORK, help="network, or autoencoder"
    )
    export: str | None = setting(None, fingerprint=False, help="also write the weights here")


@dataclass
class QatOptions(FitOptions, QatNumbers):
    """Quantization-aware training of a float network."""

    quantizes: ClassVar[bool] = True
    trains_on_images: ClassVar[bool] = True
    checkpoints: ClassVar[int] = 5

    kind: str = setting("qat", choices=("qat",), help="which fit: chosen by fit=qat")
    weight_decay: float = setting(0.0, low=0, most=MOST_RATE, help="weight decay of the weights")
    lr_generator: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of TDQ's generators"
    )
    decay_generator: float = setting(
        0.0, low=0, most=MOST_RATE, help="weight decay of the generators"
    )
    real_rounding: float = setting(
        0.2, low=0.0, high=1.0, help="NIPQ: final share of the updates, which round for real"
    )
    correction: str = _correction()  # type: ignore[misc]

    def check(self) -> None:
        super().check()
        if self.corrects and self.chooses_checkpoint:
            raise ValueError(
                f"fit.correction={self.correction}: corrects the last network; take fit.report=last"
            )


@dataclass
class PtqNumbers:
    """Numbers of post-training quantization that a protocol gives."""

    updates: int = setting(
        0, low=1, most=MOST_UPDATES, help="updates of each block, or of the fit over time"
    )
    batch_size: int = setting(
        1, low=1, most=MOST_SAMPLES, help="samples of an update, over all processes"
    )
    lr: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of step sizes and lower bounds"
    )
    lr_zero_point: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of zero points, in shares of the grid"
    )
    lr_generator: float = setting(
        0.0, low=0, most=MOST_RATE, help="learning rate of TDQ's generators"
    )
    validation_samples: int = setting(
        1024, low=1, most=MOST_SAMPLES, help="(x, t, eps) of the validation set"
    )
    rounding_updates: int = setting(
        20000, low=1, most=MOST_UPDATES, help="AdaRound: updates of each block"
    )


@dataclass
class ReconstructOptions(PtqNumbers):
    """Numbers of the reconstruction of one block, and of the fit over time."""

    power: float = setting(2.4, above=0, most=100, help="p of a block's loss")
    balance: bool = setting(
        False,
        since=False,
        named={True: "balanced"},
        help="weight the loss so that every time step counts equally",
    )
    rounding: str = setting(
        "nearest",
        choices=("nearest", "adaround"),
        named={"adaround": "adaround"},
        help="how weights are rounded: to the nearest code, or as AdaRound learns it",
    )
    lr_rounding: float = setting(1.0e-3, low=0, most=MOST_RATE, help="AdaRound: learning rate of V")
    rounding_weight: float = setting(
        0.01, low=0, most=1e6, help="AdaRound: weight of its penalty, lambda"
    )
    beta_start: float = setting(
        20.0, above=0, most=1000, since=20.0, help="AdaRound: beta at its start"
    )
    beta_end: float = setting(2.0, above=0, most=1000, since=2.0, help="AdaRound: beta at its end")
    beta_schedule: str = setting(
        "cosine",
        choices=("cosine", "linear"),
        since="cosine",
        named={"linear": "linearbeta"},
        help="AdaRound: how beta falls; BRECQ's code has it linear",
    )
    rounding_warmup: float = setting(
        0.2,
        low=0,
        high=1,
        since=0.2,
        help="AdaRound: initial share of the updates, without the regularizer",
    )

    @property
    def learns_rounding(self) -> bool:
        """Whether the rounding of weights is trained."""
        return self.rounding == "adaround"

    @property
    def block_updates(self) -> int:
        """Updates of one block: of its activations, and of its weights' rounding."""
        return self.updates + (self.rounding_updates if self.learns_rounding else 0)


@dataclass
class PtqOptions(FitOptions, ReconstructOptions):
    """Post-training quantization over a calibration set."""

    quantizes: ClassVar[bool] = True
    needs_calibration_set: ClassVar[bool] = True

    kind: str = setting("ptq", choices=("ptq",), help="which fit: chosen by fit=ptq")
    reconstruct: bool = setting(False, help="reconstruct the network block by block")
    correction: str = _correction()  # type: ignore[misc]
    memory_gb: float = setting(
        4.0, above=0, most=1e6, fingerprint=False, help="memory budget; the rest goes to files"
    )
    stop_after: int = setting(
        0, low=0, most=MOST_UPDATES, fingerprint=False, help="leave after so many blocks"
    )

    @property
    def reconstructs(self) -> bool:
        return self.reconstruct

    def check(self) -> None:
        super().check()

        if self.learns_rounding and not self.reconstruct:
            raise ValueError(
                f"fit.rounding={self.rounding}: is learned by a block's reconstruction, and"
                " fit.reconstruct=false makes none"
            )
