"""Post-training quantization: calibrate over a calibration set, then fit step sizes to it.

| method          | start of the activations | then                                        |
|-----------------|--------------------------|---------------------------------------------|
| MinMax          | minimum and maximum      | nothing                                     |
| MinMax + TDQ    | least squared error      | a fit over t for each tensor (`over_time`)  |
| PTQ4DM (+ TDQ)  | least squared error      | block reconstruction (`block_by_block`)     |

Weights are affine by output channel, rounded to nearest, or with AdaRound.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.draws import share_of
from tdq_exp.fit.calibrated import BATCH, set_batches
from tdq_exp.fit.calibration_options import IMPORTED, CalibrationSpec
from tdq_exp.fit.correction import correct
from tdq_exp.fit.fit import Subject, Work
from tdq_exp.fit.losses import validation_draws, validation_loss
from tdq_exp.fit.options import PtqOptions
from tdq_exp.fit.ptq.block_by_block import BlockByBlock
from tdq_exp.fit.ptq.calibration_set import make_set, require_steps
from tdq_exp.fit.ptq.imported_set import ImportedSet, read_set
from tdq_exp.fit.ptq.over_time import fitted_over_time, make_over_time
from tdq_exp.fit.ptq.part_file import quant_layers
from tdq_exp.fit.ptq.stored_set import CalibrationSet, require_parts, require_set
from tdq_exp.fit.quantized import QuantizedFit
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers, code_weights
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import bank_of
from tdq_exp.runtime import files
from tdq_exp.runtime.context import RunContext

STEP = 5  # forward passes of the float network that one update of a block takes


@dataclass
class PtqHistory:
    """What a fit noted.

    Args:
        blocks: for each, the losses before and after, and whether the new values were kept.
        over_time: of a fit over time, the error before and after.
        seconds: spent, interrupted runs included.
    """

    blocks: list[dict[str, Any]] = field(default_factory=list)
    over_time: dict[str, float] | None = None
    seconds: float = 0.0


class Ptq(QuantizedFit[PtqOptions]):
    """Fits quantizers to a calibration set; weights keep their float values, or change by rounding.

    Args:
        options: numbers of the fit.
        calibration: what the set holds.
        trajectory: sampler of the float network's own runs, which most sets are made of.
    """

    def __init__(self, options: PtqOptions, calibration: CalibrationSpec, trajectory: Ddim) -> None:
        super().__init__(options)
        self.calibration, self.trajectory = calibration, trajectory
        self._imported: ImportedSet | None = None

    @property
    def encodes_training_images(self) -> bool:
        return self.calibration.encodes_images

    def parts(self, subject: Subject, seed: int) -> dict[str, Any]:
        return super().parts(subject, seed) | {
            "calibration": files.fingerprint(self.set_parts(subject))
        }

    def set_parts(self, subject: Subject) -> dict[str, Any]:
        """Return what the calibration set depends on."""
        imported = self.imported(subject.model)
        if imported is not None:
            return imported.parts()

        model = subject.groups["model"] | subject.model.parts()
        sampler = dataclasses.asdict(self.trajectory)
        return self.calibration.parts(
            model, str(subject.weights), sampler, subject.data.train.content
        )

    def require_files(self) -> None:
        if self.calibration.path is not None and self.calibration.kind != IMPORTED:
            require_set(Path(self.calibration.path).expanduser())

    def require_startable(self, subject: Subject, world: int, micro_batches: int = 1) -> None:
        if self.options.reconstruct:
            share_of(self.options.batch_size, 0, world)
        if self.imported(subject.model) is not None:
            return

        require_steps(self.calibration, len(self.trajectory.pairs(subject.model.schedule)))
        if self.calibration.path is not None:
            require_parts(Path(self.calibration.path).expanduser(), self.set_parts(subject))

    def imported(self, model: DiffusionModel) -> ImportedSet | None:
        """Return the set of another project, if `calibration.path` names one.

        Raises:
            ValueError: if it is not of this model.
        """
        spec = self.calibration
        if spec.kind != IMPORTED:
            return None
        if spec.path is None:
            raise ValueError("calibration.kind=imported: needs calibration.path=FILE.pt")
        if model.classes is not None:
            raise ValueError(
                f"calibration.path={spec.path}: holds no classes, and the network asks for them;"
                " take a set of ours"
            )
        if self._imported is None:
            path = Path(spec.path).expanduser()
            self._imported = read_set(path, model.sample_shape, model.steps)
        return self._imported

    def run(
        self, context: RunContext, net: nn.Module | None, subject: Subject
    ) -> tuple[nn.Module, dict[str, Any]]:
        if net is None:
            raise ValueError("model.weights has no value: quantization starts from a float network")
        model, processes = subject.model, context.processes
        held_out = subject.samples(model, subject.data.held_out, context)

        # 1. The calibration set, from the float network.
        samples = self._calibration_set(net, subject, context)

        # 2. Start values.
        began = time.monotonic()
        float_net = copy.deepcopy(net)
        seen = {"set": files.fingerprint(self.set_parts(subject))}
        net = self.calibrate(net, subject, set_batches(samples), seen, context)
        calibration_seconds = time.monotonic() - began

        # 3. The fit, and a correction of what the fitted network predicts.
        history = fit_to_set(net, float_net, model, samples, self.options, context)
        began, corrected = time.monotonic(), {}
        if self.options.corrects:
            rule = self.options.correction
            corrected["correction"] = correct(net, float_net, model, samples, processes, rule)
        correction_seconds = time.monotonic() - began

        # 4. What it is worth.
        draws = validation_draws(model, held_out, self.options.validation_samples, context.seed)
        loss = validation_loss(net, model, held_out, draws, BATCH, processes)

        return net, {
            "seconds": round(calibration_seconds + history.seconds + correction_seconds, 1),
            "validation_loss": loss,
            "blocks": history.blocks,
            "blocks_not_kept": [block["block"] for block in history.blocks if not block["kept"]],
            "over_time": history.over_time,
            "best": [],
            **corrected,
        }

    def _calibration_set(
        self, net: nn.Module, subject: Subject, context: RunContext
    ) -> CalibrationSet:
        spec, model = self.calibration, subject.model
        imported = self.imported(model)
        if imported is not None:
            return imported.stored(context.cache, context.processes)

        images = (
            subject.samples(model, subject.data.train, context) if spec.encodes_images else None
        )
        return make_set(
            spec,
            Denoiser(net, model),
            self.trajectory,
            images,
            parts=self.set_parts(subject),
            cache=context.cache,
            processes=context.processes,
            path=Path(spec.path).expanduser() if spec.path else None,
        )

    def work(self, model: DiffusionModel, net: nn.Module, sampling_steps: int) -> Work:
        """Return the estimated cost of the fit.

        It counts making the set, unless that is cached; the calibration; and for each block half a
        pass of both networks over the set, and its updates as fractions of a training step. Without
        reconstruction, TDQ's fit costs about one pass over the set.
        """
        o, spec = self.options, self.calibration
        runs = 0 if spec.encodes_images else spec.images * sampling_steps
        passes = runs + 2 * spec.samples
        updates = "no reconstruction"

        if o.reconstruct:
            blocks = len({role.block for role in model.roles(net).values()})
            passes = runs + spec.samples * (1 + blocks) + STEP * o.block_updates * o.batch_size
            updates = f"{o.updates} updates a block"

        if o.corrects:
            passes += 2 * spec.samples
        disk = spec.samples * 4 * math.prod(model.sample_shape)
        text = f"{o.kind}, {spec.samples} {spec.kind} samples, making them included, {updates}"
        return Work(passes, disk, text)


def fit_to_set(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    options: PtqOptions,
    context: RunContext,
) -> PtqHistory:
    """Fit a calibrated network in place.

    Args:
        net: quantized and calibrated, on the processes' device.
        float_net: the same network in float: the targets.
        model: their description.
        samples: the calibration set.
        options: numbers of the fit.
        context: of the run; finished blocks are kept in its folder.

    Raises:
        ValueError: if the processes can't share a batch evenly.
        InterruptedError: see `PtqOptions.stop_after`.
    """
    processes = context.processes
    if options.reconstruct:
        share_of(options.batch_size, processes.rank, processes.world)  # refused before any work

    # Only what the fit is to learn takes gradients; weights become codes.
    _freeze_all_but_quantizers(net)
    float_net.requires_grad_(False)
    grids = _grids(net)
    code_weights(net)

    # Block by block, or every step size over t; else what was calibrated stays.
    history = PtqHistory()
    if options.reconstruct:
        blocks = BlockByBlock(net, float_net, model, samples, options, context, grids)
        for report in blocks.run():
            history.blocks.append(report)
            history.seconds += report["seconds"]
    elif fitted_over_time(net):
        history.over_time = make_over_time(net, model, samples, options, context)
        history.seconds = history.over_time["seconds"]

    return history


def _freeze_all_but_quantizers(net: nn.Module) -> None:
    """Let gradients reach activation quantizers and what they share, and nothing else."""
    quantizers = activation_quantizers(net).values()
    learned = {id(p) for q in quantizers for p in q.parameters()}
    bank = bank_of(net)
    if bank is not None:
        learned |= {id(p) for p in bank.parameters()}

    for parameter in net.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in learned)


def _grids(net: nn.Module) -> dict[str, Grid]:
    """Return the grid of every layer's weights, by name of the layer."""
    grids = {}
    for name, layer in quant_layers(net).items():
        quantizer: Any = layer.weight_quantizer
        grids[name] = quantizer.grid
    return grids
