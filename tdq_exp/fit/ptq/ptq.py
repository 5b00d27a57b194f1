"""Post-training quantization: calibrate over a calibration set, then fit intervals to it, block by block or tensor by tensor.

| method          | start of the activations | then |
|-----------------|--------------------------|------|
| MinMax          | minimum and maximum      | nothing |
| MinMax + TDQ    | least squared error      | generators fitted to each tensor's error over t (`time_fit`) |
| PTQ4DM (+ TDQ)  | least squared error      | block reconstruction (`reconstruct`) |

Weights are affine by output channel, rounded to nearest, or with AdaRound. Every finished block is a file, so that a fit
that was killed goes on at the next block and ends with the same bits. A block's inputs and targets are computed anew for
each block and kept in memory or on disk, as the budget says: nothing grows with the number of blocks.
"""

from __future__ import annotations

import shutil
import time as clock
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.diffusion.draws import Stream, seed_global, share_of
from tdq_exp.fit.calibrated import BATCH, Shown, of_set, show
from tdq_exp.fit.checkpoint import load_state, save_state
from tdq_exp.fit.loop import Log
from tdq_exp.fit.ptq.blocks import Block, blocks_of, inputs_of, output_of
from tdq_exp.fit.ptq.calibration_set import CalibrationSet
from tdq_exp.fit.ptq.capture import Spill, needed_bytes
from tdq_exp.fit.ptq.over_time import fit_over_time, observed
from tdq_exp.fit.ptq.reconstruct import BlockData, Reconstruction, ReconstructOptions
from tdq_exp.fit.qat import Rates
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers, code_weights
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.temporal import Temporal
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, track

HELD_OUT = 0.1  # share of the trajectories that no block is trained on
LOOKED_AT = 256  # training samples over which a block's loss is given, before and after


@dataclass
class PtqHistory:
    """What a fit noted. `blocks`: for each, the losses before and after, and whether the new values were kept."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    over_time: dict[str, float] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class PtqOptions:
    """Args:
    reconstruct: block by block; False leaves it at the calibration, and at generators fitted tensor by tensor.
    block: numbers of a reconstruction, and of the fit over time.
    memory_gb: budget; a quarter of it may hold a block's inputs and targets, the rest goes to files.
    stop_after: leave after so many blocks, as a kill would (0: don't); for rehearsals.
    """

    reconstruct: bool
    block: ReconstructOptions
    memory_gb: float = 4.0
    stop_after: int = 0

    def __post_init__(self) -> None:
        if self.memory_gb <= 0:
            raise ValueError(f"fit.memory_gb={self.memory_gb}: must be positive")


def ptq(
    net: nn.Module,
    float_net: nn.Module,
    model: DiffusionModel,
    samples: CalibrationSet,
    options: PtqOptions,
    *,
    seed: int,
    folder: Path,
    mark: str,
    processes: Processes,
    log: Log | None = None,
) -> tuple[nn.Module, PtqHistory]:
    """Fits a calibrated network in place.

    Args:
        net: quantized and calibrated, on the processes' device.
        float_net: the same network in float: the targets.
        model: their description.
        samples: the calibration set.
        seed: of the draws.
        folder: where finished blocks are kept.
        mark: the fit's fingerprint; files of another fit are refused.
        log: receives losses, by number of the block.

    Raises:
        ValueError: if the processes can't share a batch evenly.
        InterruptedError: see `PtqOptions.stop_after`.
    """
    if options.reconstruct:
        share_of(options.block.batch_size, processes.rank, processes.world)  # refused before any work is done
    quantizers = activation_quantizers(net)
    learned = {id(p) for q in quantizers.values() for p in q.parameters()}
    learned |= {
        id(p) for q in quantizers.values() if isinstance(q.interval, Temporal) for p in q.interval.bank.parameters()
    }
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in learned)
    float_net.requires_grad_(False)
    grids = {name: _grid(layer) for name, layer in _layers(net).items()}
    code_weights(net)
    history = PtqHistory()
    shown = of_set(samples)
    if options.reconstruct:
        _blocks(net, float_net, model, samples, shown, grids, options, history, seed, folder, mark, processes, log)
    elif any(isinstance(q.interval, Temporal) for q in quantizers.values()):
        _over_time(net, model, samples, shown, options, history, seed, folder, mark, processes, log)
    return net, history


def _layers(module: nn.Module, prefix: str = "") -> dict[str, QuantLayer]:
    dot = f"{prefix}." if prefix else ""
    return {f"{dot}{name}".rstrip("."): m for name, m in module.named_modules() if isinstance(m, QuantLayer)}


def _grid(layer: QuantLayer) -> Grid:
    quantizer: Any = layer.weight_quantizer
    return quantizer.grid


def _over_time(
    net: nn.Module, model: DiffusionModel, samples: CalibrationSet, shown: Shown, options: PtqOptions,
    history: PtqHistory, seed: int, folder: Path, mark: str, processes: Processes, log: Log | None,
) -> None:  # fmt: skip
    """MinMax + TDQ. Values are gathered by all processes; each then makes the same fit, and the main one's counts."""
    everything = Block("over_time", activation_quantizers(net))
    file = folder / "over_time.pt"
    found = _load(file, mark, processes)
    if found is None:
        began = clock.monotonic()
        with (
            observed(everything.quantizers) as observers,
            torch.no_grad(),
            track("looking", shown.batches, show=processes.main) as advance,
        ):
            for number in range(shown.batches):
                if number % processes.world == processes.rank:
                    for observer in observers.values():
                        observer.batch = number
                    show(net, model, shown, number, processes)
                advance("")
        if processes.world > 1:
            for name, observer in observers.items():
                for part in processes.gather_objects((name, observer.seen)):
                    observers[part[0]].seen.update(part[1])
        values = {name: observer.all() for name, observer in observers.items()}
        o = options.block
        before, after = fit_over_time(
            everything.quantizers, values, samples.times(), net.time,  # type: ignore[arg-type]
            updates=o.updates, batch_size=o.batch_size, rates=Rates(0.0, 0.0, o.lr, o.lr_zero_point, o.lr_generator, 0.0),
            seed=seed, device=processes.device, show=processes.main,
        )  # fmt: skip
        report = {"before": before, "after": after, "seconds": clock.monotonic() - began}
        made = {"mark": mark, "report": report, **_state(net, everything)}
        processes.decide(partial(save_state, file, made))
        found = _load(file, mark, processes)  # what every process goes on with
        assert found is not None
    _restore(net, everything, found)
    history.over_time = found["report"]
    history.seconds = found["report"]["seconds"]
    if log is not None:
        log({f"over_time/{key}": value for key, value in found["report"].items()}, 1)


def _blocks(
    net: nn.Module, float_net: nn.Module, model: DiffusionModel, samples: CalibrationSet, shown: Shown,
    grids: dict[str, Grid], options: PtqOptions, history: PtqHistory, seed: int, folder: Path, mark: str,
    processes: Processes, log: Log | None,
) -> None:  # fmt: skip
    """Reconstructs every block in running order, or takes it from its file."""
    found = blocks_of(net, model, model.roles(float_net))
    image = torch.from_numpy(samples.image())
    first_held_out = max(1, round(samples.images * (1 - HELD_OUT)))
    train, held_out = (image < first_held_out).nonzero()[:, 0], (image >= first_held_out).nonzero()[:, 0]
    held_out = held_out if len(held_out) else train  # a rehearsal's set may be of one trajectory
    t = samples.times()
    rounded = options.block.rounding == "adaround"
    each = options.block.updates + (options.block.rounding_updates if rounded else 0)
    folder = folder / "blocks"
    processes.decide(lambda: folder.mkdir(parents=True, exist_ok=True))
    files = [folder / f"{number:03d}.pt" for number in range(len(found))]
    done = processes.decide(lambda: next((i for i, file in enumerate(files) if not file.exists()), len(files)))
    with track("reconstructing", len(found) * each, done * each, show=processes.main) as advance:
        for number, (block, file) in enumerate(zip(found, files, strict=True)):
            saved = _load(file, mark, processes)
            if saved is None:
                began = clock.monotonic()
                seed_global(seed, Stream.BLOCK_NOISE, number, processes.rank)  # dropout, if any
                seen = capture(net, float_net, model, shown, block, options, folder, processes)
                data = BlockData(*seen, t, train, held_out)
                work = Reconstruction(net, block, data, options.block, (seed, number), processes)
                report = _reconstruct(net, float_net, block, work, grids, options, processes, advance)
                report |= {"block": block.name, "seconds": round(clock.monotonic() - began, 2)}
                for spill in (*data.inputs, data.target):
                    spill.close()
                processes.barrier()
                made = {"mark": mark, "report": report, **_state(net, block, rounded)}
                processes.decide(partial(_finish, folder, file, made))
                saved = _load(file, mark, processes)  # what every process goes on with
                assert saved is not None
            _restore(net, block, saved)
            report = saved["report"]
            history.blocks.append(report)
            history.seconds += report["seconds"]
            if not report["kept"] and processes.main:
                console.print(f"{block.name}: no better on held-out samples, keeps its start values", markup=False)
            if log is not None:
                log(
                    {
                        f"block/{k}": report[k]
                        for k in ("train_before", "train_after", "held_out_before", "held_out_after")
                    },
                    number + 1,
                )
            if number + 1 == options.stop_after and number + 1 < len(found):
                raise InterruptedError(f"stopped after block {number + 1}, as asked")


def _reconstruct(
    net: nn.Module, float_net: nn.Module, block: Block, work: Reconstruction, grids: dict[str, Grid],
    options: PtqOptions, processes: Processes, advance: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains one block and puts its start values back if that did not help; losses before and after."""
    looked_at = work.data.train[:: max(1, len(work.data.train) // LOOKED_AT)]
    power = options.block.power

    def losses() -> tuple[float, float]:
        return processes.decide(lambda: (work.loss(looked_at, power), work.loss(work.data.held_out, power)))

    rounded = options.block.rounding == "adaround"
    if options.block.balance:
        work.balance(looked_at)
    before, start = losses(), _state(net, block, rounded)
    if rounded:
        layers = _layers(work.module, block.name)
        weights = {name: (float_net.get_parameter(f"{name}.weight").detach(), grids[name]) for name in layers}
        work.train_rounding(layers, weights, advance)  # type: ignore[arg-type]
    work.train_activations(advance)
    after = losses()
    kept = after[1] < before[1]
    if not kept:
        _restore(net, block, start)
    names = ("train_before", "held_out_before", "train_after", "held_out_after")
    return {**dict(zip(names, (*before, *after), strict=True)), "kept": kept}


@torch.no_grad()
def capture(
    net: nn.Module, float_net: nn.Module, model: DiffusionModel, shown: Shown, block: Block, options: PtqOptions,
    folder: Path, processes: Processes,
) -> tuple[Any, list[Spill], Spill]:  # fmt: skip
    """(call, inputs, target) of a block over the whole set: inputs from the quantized network, targets from the float one."""
    spill = folder / "spill"
    processes.decide(partial(_fresh, spill))
    stores: list[Spill] = []
    call = None
    for number in range(shown.batches):
        # Every process looks at the first batch, which shows the shapes.
        if number and number % processes.world != processes.rank:
            continue
        run = partial(show, model=model, shown=shown, number=number, processes=processes)
        now = inputs_of(net, block.name, partial(run, net))
        target = output_of(float_net, block.name, partial(run, float_net))
        tensors = [*now.tensors, target]
        if call is None:
            call = now
            shapes = [tensor.shape[1:] for tensor in tensors]
            in_files = processes.world > 1 or needed_bytes(shown.samples, shapes) > options.memory_gb * 1e9 / 4
            stores = [
                Spill(shown.samples, shape, spill / str(i) if in_files else None) for i, shape in enumerate(shapes)
            ]
        for store, tensor in zip(stores, tensors, strict=True):
            store.put(number * BATCH, tensor)
    processes.barrier()
    assert call is not None
    return call, stores[:-1], stores[-1]


def _state(net: nn.Module, block: Block, rounded: bool = False) -> dict[str, Any]:
    """All that a fit can change in a block: its quantizers, their generators and, if they are, its rounded weights."""
    quantizers = {name: {k: v.clone() for k, v in q.state_dict().items()} for name, q in block.quantizers.items()}
    timed = [q.interval for q in block.quantizers.values() if isinstance(q.interval, Temporal)]
    rows = [interval.row for interval in timed]
    generators = timed[0].bank.subset(rows).state_dict() if timed else {}
    codes = {}
    for name, layer in _layers(net.get_submodule(block.name), block.name).items() if rounded else ():
        coded: Any = layer.weight_quantizer
        codes[name] = coded.codes.clone()
    return {"quantizers": quantizers, "generators": {k: v.clone() for k, v in generators.items()}, "codes": codes}


@torch.no_grad()
def _restore(net: nn.Module, block: Block, state: dict[str, Any]) -> None:
    """Puts back what `_state` gave."""
    for name, q in block.quantizers.items():
        q.load_state_dict(state["quantizers"][name])
    timed = [q.interval for q in block.quantizers.values() if isinstance(q.interval, Temporal)]
    if timed:
        part = timed[0].bank.subset([interval.row for interval in timed])
        part.load_state_dict(state["generators"])
        timed[0].bank.take_back(part)
    for name, codes in state["codes"].items():
        coded: Any = net.get_submodule(name).weight_quantizer
        coded.load_state_dict({**coded.state_dict(), "codes": codes})


def _load(file: Path, mark: str, processes: Processes) -> dict[str, Any] | None:
    """A finished block, or None.

    Raises:
        ValueError: if the file is damaged or of another fit.
    """

    def load() -> dict[str, Any] | None:
        found = load_state(file)
        if found is not None and found["mark"] != mark:
            raise ValueError(f"{file}: a block of another fit; remove {file.parent} to start this one")
        return found

    return processes.decide(load)


def _finish(folder: Path, file: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(folder / "spill", ignore_errors=True)
    save_state(file, state)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
