"""The fit stage: a float network loaded or trained, quantized, fitted and baked.

A fit is looked for under its fingerprint before anything is computed, and goes on wherever it was
stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.data.images import Data
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.first_layer import first_range, noise_beyond
from tdq_exp.fit import quantized
from tdq_exp.models.weights.load import load_weights, save_weights
from tdq_exp.quant.convert import bake
from tdq_exp.runtime import environment, figures
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.stage import Result, StageFile, stage
from tdq_exp.runtime.tracking import Tracker

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
    record = StageFile(job.folder / "fit.json", fit_parts(job, data, weights), about)
    context = RunContext(
        folder=job.folder,
        fingerprint=record.fingerprint,
        seed=job.seed,
        processes=processes,
        cache=job.data.cache,
        log=tracker.log if processes.main else None,
    )
    made: list[nn.Module] = []

    def make() -> Result:
        def begin() -> None:
            job.fit.require_startable(job.subject(data, weights), processes.world)
            record.begin()

        processes.decide(begin)
        fitted, facts = job.fit.run(context, net, job.subject(data, weights))
        if job.fit.options.quantizes:
            fitted, first_layer = _bake(job, fitted, context, tracker)
            facts |= first_layer

        made.append(fitted)
        return {"done": True, "facts": _facts(job, weights, facts, processes)}

    result, _ = stage(record, make, processes)
    named = {**about, "fingerprint": record.fingerprint, **result}
    processes.decide(lambda: job.fit.export(job.folder, named))

    def network() -> nn.Module:
        # Read when it is wanted: where the row is there already, there need not be a net.
        if not made:
            loaded = net if job.fit.options.loads_only else None
            made.append(loaded or finished_net(job, processes.device))
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


def finished_net(
    job: Experiment, device: torch.device, checkpoint: Path | None = None
) -> nn.Module:
    """Return the network of a finished fit, or of one of its checkpoints, baked.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, or is not of this fit.
    """
    if checkpoint is None:
        return job.fit.finished(job.model, job.recipe, job.folder, device)

    net = job.fit.skeleton(job.model, job.recipe)
    load_weights(net, str(checkpoint))
    return bake(net, inplace=True).to(device)


def _bake(
    job: Experiment, net: nn.Module, context: RunContext, tracker: Tracker
) -> tuple[nn.Module, dict[str, Any]]:
    """Show step sizes over time, turn them into tables, and write the network."""
    decide = context.processes.decide

    tables = quantized.interval_tables(net)
    if tables:  # dynamic ones have no step size before they see an input
        picture, title = job.folder / "intervals.png", f"{job.name}: step sizes and zero points"
        decide(lambda: figures.intervals_over_time(tables, picture, title))
        tracker.intervals({name: s for name, (s, _) in tables.items()})
        tracker.picture("intervals", picture)

    baked = bake(net)
    about = {"fit": context.fingerprint}
    decide(lambda: save_weights(baked, job.folder / quantized.BAKED, about))
    return baked, _first_layer(job, baked, context.processes.main)


def _facts(
    job: Experiment, weights: str | None, found: dict[str, Any], processes: Processes
) -> dict[str, Any]:
    """Return the facts of a fit's record: its own, and where it was made."""
    facts: dict[str, Any] = {"weights": weights, "seconds": 0.0, "validation_loss": None, **found}
    if not job.fit.options.loads_only:
        facts |= {"processes": processes.world, "peak_memory_gb": environment.peak_memory_gb()}
    return facts | {"environment": environment.environment()}


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
            markup=False,
        )
    return {"first_layer": {"t": t, "range": found, "noise_beyond": share}}
