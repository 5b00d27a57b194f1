"""The fit stage: a float network loaded or trained, quantized, fitted and baked.

A fit is looked for under its fingerprint before anything is computed, and goes on wherever it was
stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.data.images import Data
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.first_layer import first_range, noise_beyond
from tdq_exp.experiment.row import require_rows_of
from tdq_exp.experiment.stored_network import (
    finished_net,
    network_is_here,
    read_fit,
    require_recorded,
)
from tdq_exp.fit import quantized
from tdq_exp.models.weights.fill import save_weights, state_hash
from tdq_exp.quant.convert import bake
from tdq_exp.runtime import environment, figures, tensor_files
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.stage import Result, StageFile, stage
from tdq_exp.runtime.tracking import Tracker

AGAIN = "again"  # folder of a fit that is repeated
STATES = ("state.pt", "blocks", "over_time.pt")  # from which a fit goes on
BEYOND = 1e-3  # share of the starting noise beyond the first layer's range that is worth a line


@dataclass(frozen=True)
class FittedModel:
    """A finished fit.

    Args:
        net: gives the network to sample from, made when it is first wanted.
        fingerprint: of the fit.
        facts: what its record states, and the row cites.
    """

    net: Callable[[], nn.Module]
    fingerprint: str
    facts: dict[str, Any]


def run_fit(job: Experiment, data: Data, processes: Processes, tracker: Tracker) -> FittedModel:
    """Return the network of a run: loaded, trained, or found where an earlier run left it."""
    net, weights = None, None
    if job.fit.options.needs_weights:
        net, weights = float_net(job, processes)
    processes.decide(job.trained.parts)  # another download, or complaint

    about = {"name": job.name, "config": job.recorded()}
    record = StageFile(job.folder / FIT_RECORD, fit_parts(job, data, weights), about)
    context = RunContext(
        folder=job.folder,
        fingerprint=record.fingerprint,
        seed=job.seed,
        processes=processes,
        cache=job.data.cache,
        log=tracker.log if processes.main else None,
        micro_batches=job.machine.launcher.micro_batches,
        recompute=job.machine.launcher.recompute,
        compile=job.machine.launcher.compile,
    )
    made: list[nn.Module] = []

    def make() -> Result:
        def begin() -> None:
            job.fit.require_startable(
                job.subject(data, weights), processes.world, context.micro_batches
            )
            if not record.file.exists():
                require_rows_of(job.folder, job.recorded())
            record.begin()

        processes.decide(begin)
        fitted, facts = job.fit.run(context, net, job.subject(data, weights))
        if job.fit.options.quantizes:
            fitted, first_layer = _bake(job, fitted, context, tracker)
            facts |= first_layer

        which = processes.decide(job.weights.which)
        facts |= {"which_weights": which} if which is not None else {}

        made.append(fitted)
        if not job.fit.options.loads_only:
            facts |= {"network": state_hash(fitted.state_dict())}
        return {"done": True, "facts": _facts(job, weights, facts, processes)}

    result, new = stage(record, make, processes)
    if not new and not job.fit.options.loads_only:
        _confirm_network(job, data, weights, net, context)
    named = {**about, "fingerprint": record.fingerprint, **result}
    processes.decide(lambda: job.fit.export(job.folder, named))

    def network() -> nn.Module:
        # Read when it is wanted: where the row is there already, there need not be a net.
        if not made and job.fit.options.loads_only:
            assert net is not None
            made.append(net)
        if not made:
            if not processes.decide(lambda: network_is_here(job)):
                _fit_again(job, data, weights, net, context)
            made.append(finished_net(job, record.fingerprint, processes.device))
        return made[0]

    return FittedModel(network, record.fingerprint, result["facts"])


def float_net(job: Experiment, processes: Processes) -> tuple[nn.Module, str]:
    """Return the float network with its weights, and their hash."""
    net = job.model.build()
    found = processes.decide(lambda: job.weights.load(job.model, net))  # downloads happen here
    if not processes.main:
        job.weights.load(job.model, net)
    return net.to(processes.device).eval(), found


def fit_parts(job: Experiment, data: Data, weights: str | None) -> dict[str, Any]:
    """Return what a fit depends on, for its fingerprint."""
    return job.fit.parts(job.subject(data, weights), job.seed)


def _confirm_network(
    job: Experiment, data: Data, weights: str | None, net: nn.Module | None, context: RunContext
) -> None:
    """Look whether a finished fit's network is whole; make it again where the fit's states are.

    Networks of published runs are removed or packed: a line says that one is not here.

    Raises:
        ValueError: if it is damaged, and nothing is left to make it from.
    """
    folder, decide = job.folder, context.processes.decide
    file = job.fit.network_file(folder)

    def fault() -> str | None:
        if not file.exists():
            return f"{file}: is not here"
        try:
            found = tensor_files.read_tensors(file)
            tensor_files.require_of(file, found.metadata, context.fingerprint)
        except ValueError as error:
            return str(error)
        return None

    found = decide(fault)
    if found is None:
        return

    # 1. Nothing to make it from: what is gone is gone, what is damaged is refused.
    repeatable = decide(lambda: any((folder / name).exists() for name in STATES))
    if not repeatable and decide(file.exists):
        raise ValueError(
            f"{found.partition(';')[0]}; put it back, or remove it and {folder / FIT_RECORD} to fit"
            " again"
        )

    if context.processes.main:
        advice = "made again from the states of its fit" if repeatable else "the record stands"
        console.print(f"note: {found.partition(';')[0]}: {advice}")
    if not repeatable:
        return

    # 2. The fit, from the states that it left, and the same bits.
    _repeat(job, data, weights, net, context)


def _fit_again(
    job: Experiment, data: Data, weights: str | None, net: nn.Module | None, context: RunContext
) -> None:
    """Fit a network that is not here from the start: something new is wanted of a recorded fit.

    It works in a folder of its own, so that the run's folder stays as it was until the network is
    known to be the recorded one.

    Raises:
        ValueError: before it begins if the network could not be told from another, or the fit was
            made where other bits come out; at the end if it is not the recorded one.
    """
    decide, scratch = context.processes.decide, context.folder / AGAIN

    def announce() -> None:
        _require_repeatable(job, context)
        console.print(
            f"note: fitting again, to the network whose hash {job.folder / FIT_RECORD} states",
        )
        scratch.mkdir(exist_ok=True)

    decide(announce)
    try:
        _repeat(job, data, weights, net, dataclasses.replace(context, folder=scratch))
    except ValueError:
        if context.processes.main:  # no message to the others: they may be somewhere else
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    decide(lambda: shutil.rmtree(scratch))


def _require_repeatable(job: Experiment, context: RunContext) -> None:
    """Refuse to repeat a fit whose network can't come out, or could not be recognised.

    Raises:
        ValueError: naming what differs.
    """
    path, file = job.folder / FIT_RECORD, job.fit.network_file(job.folder)
    record = read_fit(job.folder)
    facts = record["facts"] if record is not None else {}
    own = "label=NAME, or another out=FOLDER, gives a network of its own"

    if facts.get("network") is None:
        raise ValueError(
            f"{file}: is not here, and {path} states no hash of it, so that one that is fitted"
            f" again could not be told from another: {own}"
        )

    # What bits depend on, as far as it is recorded; triton is named by fits on a GPU alone.
    made = facts.get("environment", {})
    here = environment.environment(context.processes.device.type)
    old_versions, new_versions = made.get("versions", {}), here["versions"]
    compared = {
        "threads": (facts.get("threads"), torch.get_num_threads()),
        "processes": (facts.get("processes"), context.processes.world),
        "accelerator": (made.get("accelerator"), here.get("accelerator")),
        "instructions": (made.get("instructions"), here["instructions"]),
        "torch": (old_versions.get("torch"), new_versions["torch"]),
        "triton": (old_versions.get("triton"), new_versions.get("triton")),
    }
    other = [
        f"{name} {then}, here {now}"
        for name, (then, now) in compared.items()
        if then != now and (then is not None or name == "accelerator")
    ]
    if other:
        raise ValueError(
            f"{file}: is not here, and the fit of {path} was made where other bits come out"
            f" ({'; '.join(other)}): set launcher.threads and launcher.nproc as then; {own}"
        )


def _repeat(
    job: Experiment, data: Data, weights: str | None, net: nn.Module | None, context: RunContext
) -> None:
    """Run a recorded fit once more, from whatever states it left, and write its network.

    Raises:
        ValueError: if the network is not the recorded one.
    """
    decide = context.processes.decide
    quiet = dataclasses.replace(context, log=None)
    fitted, _ = job.fit.run(quiet, net, job.subject(data, weights))
    fitted = bake(fitted) if job.fit.options.quantizes else fitted

    decide(lambda: require_recorded(job.folder, job.fit.network_file(job.folder), fitted))
    if job.fit.options.quantizes:
        decide(lambda: _write_network(job, fitted, context.fingerprint))


def _write_network(job: Experiment, net: nn.Module, fit: str) -> None:
    save_weights(net, job.fit.network_file(job.folder), {"fit": fit})


def _bake(
    job: Experiment, net: nn.Module, context: RunContext, tracker: Tracker
) -> tuple[nn.Module, dict[str, Any]]:
    """Show step sizes over time, turn them into tables, and write the network."""
    decide = context.processes.decide

    tables = quantized.interval_tables(net)
    if tables:  # dynamic ones have no step size before they see an input
        picture, title = job.folder / "intervals.png", f"{job.name}: step sizes and zero points"

        def draw() -> None:
            figures.intervals_over_time(tables, picture, title)
            for drawn in (picture, picture.with_suffix(".svg")):
                figures.sign(drawn, context.fingerprint)

        decide(draw)
        tracker.intervals({name: s for name, (s, _) in tables.items()})
        tracker.picture("intervals", picture)

    baked = bake(net)
    decide(lambda: _write_network(job, baked, context.fingerprint))
    return baked, _first_layer(job, baked, context.processes.main)


def _facts(
    job: Experiment, weights: str | None, found: dict[str, Any], processes: Processes
) -> dict[str, Any]:
    """Return the facts of a fit's record: its own, and where it was made."""
    facts: dict[str, Any] = {"weights": weights, "seconds": 0.0, "validation_loss": None, **found}
    if not job.fit.options.loads_only:
        facts |= {"processes": processes.world, "threads": torch.get_num_threads()}
        facts |= {"peak_memory_gb": environment.peak_memory_gb()}
        facts |= environment.peak_gpu_memory(processes.device.type)
    if job.machine.launcher.micro_batches > 1:
        facts |= {"micro_batches": job.machine.launcher.micro_batches}
    return facts | {"environment": environment.environment(processes.device.type)}


def _first_layer(job: Experiment, net: nn.Module, say: bool) -> dict[str, Any]:
    """Return how much of the starting noise the first layer does not see."""
    t = job.model.schedule.steps - 1  # where any sampler starts, or near it: a fit knows of none

    with torch.device("meta"):  # names are all that is wanted
        roles = job.model.roles(job.model.build())

    found = first_range(net, roles, t)
    if found is None:
        return {}

    share = noise_beyond(*found)
    if say and share > BEYOND:
        edge_bits = quantized.required(job.recipe).plan.edge_bits
        advice = "" if edge_bits else "; plan=edge8 gives it 8 bits"
        console.print(
            f"note: {share:.1%} of the starting noise is beyond the range of the first layer's"
            f" input ({found[0]:.2f}..{found[1]:.2f} at t = {t}) and may come back as bright"
            f" spots{advice}",
        )
    return {"first_layer": {"t": t, "range": found, "noise_beyond": share}}
