"""Block reconstruction over a whole network, resumable at every block.

Every finished block is a file, so a fit that was killed goes on at the next block and ends with the
same bits. A block's inputs and targets are computed anew for each block and kept in memory or on
disk, as the budget says: nothing grows with the number of blocks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.diffusion.draws import Stream, seed_global
from tdq_exp.fit.calibrated import BATCH, Batches, forward_batch, set_batches
from tdq_exp.fit.checkpoint import save_state
from tdq_exp.fit.options import PtqOptions
from tdq_exp.fit.ptq.blocks import Block, Call, blocks_of, inputs_of, output_of
from tdq_exp.fit.ptq.capture import Spill, kept_type, needed_bytes
from tdq_exp.fit.ptq.part_file import put_back, quant_layers, read_part, state_of
from tdq_exp.fit.ptq.reconstruct import BlockData, Reconstruction
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.grid import Grid
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, track
from tdq_exp.runtime.tensor_files import values_of

HELD_OUT = 0.1  # share of the trajectories that no block is trained on
LOOKED_AT = 256  # training samples over which a block's loss is given, before and after
LOSSES = ("train_before", "held_out_before", "train_after", "held_out_after")
REPORTED = (*LOSSES, "kept", "block", "seconds")


class BlockByBlock:
    """The reconstruction of every block in running order.

    Args:
        net: quantized and calibrated, with coded weights; fitted in place.
        float_net: the same network in float: the targets.
        model: their description.
        samples: the calibration set.
        options: numbers of the fit.
        context: of the run.
        grids: of every layer's weights, by name of the layer.
    """

    def __init__(
        self,
        net: nn.Module,
        float_net: nn.Module,
        model: DiffusionModel,
        samples: CalibrationSet,
        options: PtqOptions,
        context: RunContext,
        grids: Mapping[str, Grid],
    ) -> None:
        self.net, self.float_net, self.model = net, float_net, model
        self.options, self.context, self.grids = options, context, grids
        self.processes, self.folder = context.processes, context.folder / "blocks"
        self.batches, self.t = set_batches(samples), samples.times()

        # Whole trajectories are held out; a rehearsal's set may have only one.
        image = torch.from_numpy(samples.image())
        first_held_out = max(1, round(samples.images * (1 - HELD_OUT)))
        self.train = (image < first_held_out).nonzero()[:, 0]
        held_out = (image >= first_held_out).nonzero()[:, 0]
        self.held_out = held_out if len(held_out) else self.train

    def run(self) -> Iterator[dict[str, Any]]:
        """Reconstruct every block, or take it from its file; yield its losses and seconds.

        Raises:
            InterruptedError: see `PtqOptions.stop_after`.
        """
        blocks = blocks_of(self.net, self.model, self.model.roles(self.float_net))
        files = [self.folder / f"{number:03d}.pt" for number in range(len(blocks))]
        each, show = self.options.block_updates, self.processes.main

        self.processes.decide(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        done = self.processes.decide(lambda: _first_missing(files))

        with track("reconstructing", len(blocks) * each, done * each, show=show) as advance:
            for number, (block, file) in enumerate(zip(blocks, files, strict=True)):
                # 1. The block's file, made if it is not there.
                saved = read_part(file, self.context)
                if saved is None:
                    self._make(number, block, file, advance)
                    saved = read_part(file, self.context)  # what every process goes on with
                if saved is None:
                    raise FileNotFoundError(
                        f"{file}: was written and is gone; run the same command again"
                    )

                # 2. Its values, in the network that the next block's inputs come from.
                with values_of(file):
                    put_back(self.net, block, saved)
                    report = {key: saved["report"][key] for key in REPORTED}
                self._log(report, number + 1)
                yield report

                if number + 1 == self.options.stop_after and number + 1 < len(blocks):
                    raise InterruptedError(f"stopped after block {number + 1}, as asked")

    def _make(self, number: int, block: Block, file: Path, advance: Callable[[str], None]) -> None:
        """Reconstruct one block and write its file."""
        began, options, context = time.monotonic(), self.options, self.context
        seed_global(context.seed, Stream.BLOCK_NOISE, number, self.processes.rank)

        # 1. What the block is shown, and what it should answer.
        seen = capture(
            self.net,
            self.float_net,
            self.model,
            self.batches,
            block,
            options.memory_gb,
            self.folder,
            self.processes,
        )
        data = BlockData(*seen, self.t, self.train, self.held_out)

        # 2. The fit.
        key = (context.seed, number)
        work = Reconstruction(self.net, block, data, options, key, self.processes)
        report = self._reconstruct(block, work, advance)
        report |= {"block": block.name, "seconds": round(time.monotonic() - began, 2)}

        # 3. The file, once nobody reads the data any more.
        for spill in (*data.inputs, data.target):
            spill.close()
        self.processes.barrier()

        state = state_of(self.net, block, options.learns_rounding)
        made = {"fingerprint": context.fingerprint, "report": report, **state}
        self.processes.decide(partial(_finish, self.folder, file, made))

    def _reconstruct(
        self, block: Block, work: Reconstruction, advance: Callable[[str], None]
    ) -> dict[str, Any]:
        """Train one block; put its start values back if that did not help."""
        options, train = self.options, work.data.train
        looked_at = train[:: max(1, len(train) // LOOKED_AT)]

        def losses() -> tuple[float, float]:
            power, held_out = options.power, work.data.held_out
            return self.processes.decide(
                lambda: (work.loss(looked_at, power), work.loss(held_out, power))
            )

        if options.balance:
            work.balance(looked_at)
        before, start = losses(), state_of(self.net, block, options.learns_rounding)

        # Rounding first, with activations in float; then the activations.
        if options.learns_rounding:
            layers = quant_layers(work.module, block.name)
            weights = {name: (self._float_weight(name), self.grids[name]) for name in layers}
            work.train_rounding(layers, weights, advance)
        work.train_activations(advance)

        after = losses()
        kept = after[1] < before[1]
        if not kept:
            put_back(self.net, block, start)
        return {**dict(zip(LOSSES, (*before, *after), strict=True)), "kept": kept}

    def _float_weight(self, layer: str) -> torch.Tensor:
        return self.float_net.get_parameter(f"{layer}.weight").detach()

    def _log(self, report: dict[str, Any], number: int) -> None:
        if not report["kept"] and self.processes.main:
            console.print(
                f"{report['block']}: no better on held-out samples, keeps its start values",
            )
        if self.context.log is not None:
            self.context.log({f"block/{key}": report[key] for key in LOSSES}, number)


@torch.no_grad()
def capture(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    batches: Batches,
    block: Block,
    memory_gb: float,
    folder: Path,
    processes: Processes,
) -> tuple[Call, list[Spill], Spill]:
    """Return (call, inputs, target) of a block over the whole set.

    Args:
        net: quantized; the block's inputs come from it.
        float_net: its targets come from this one.
        model: their description.
        batches: the calibration set.
        block: of the network.
        memory_gb: a quarter of it may hold inputs and targets, what does not fit goes to files.
        folder: of these files.
        processes: who shares the work.
    """
    spill = folder / "spill"
    processes.decide(partial(_fresh, spill))
    stores: list[Spill] = []
    call: Call | None = None

    for number in range(len(batches)):
        # Every process looks at the first batch, which shows the shapes.
        if number and number % processes.world != processes.rank:
            continue

        run = partial(
            forward_batch, model=model, batches=batches, number=number, processes=processes
        )
        inputs = inputs_of(net, block.name, partial(run, net))
        tensors = [*inputs.tensors, output_of(float_net, block.name, partial(run, float_net))]

        if call is None:
            call = inputs
            shapes = [tensor.shape[1:] for tensor in tensors]
            budget = memory_gb * 1e9 / 4
            in_files = processes.world > 1 or needed_bytes(batches.samples, shapes) > budget
            places = [spill / str(i) if in_files else None for i in range(len(shapes))]
            types = [kept_type(tensor) for tensor in tensors]
            stores = [
                Spill(batches.samples, *row) for row in zip(shapes, places, types, strict=True)
            ]

        for store, tensor in zip(stores, tensors, strict=True):
            store.put(number * BATCH, tensor)

    processes.barrier()
    if call is None:
        raise ValueError("calibration.samples=0: there is nothing to show to a block")
    return call, stores[:-1], stores[-1]


def _first_missing(files: list[Path]) -> int:
    return next((i for i, file in enumerate(files) if not file.exists()), len(files))


def _finish(folder: Path, file: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(folder / "spill", ignore_errors=True)
    save_state(file, state)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
