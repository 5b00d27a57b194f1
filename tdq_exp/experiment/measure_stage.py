"""The measure stage: the metrics of a sampled set, and the row that states them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tdq_exp.data.images import Data
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.engines import SIMULATED
from tdq_exp.experiment.fit_stage import FittedModel
from tdq_exp.experiment.paired import paired_distance
from tdq_exp.experiment.places import made_of, place_of
from tdq_exp.experiment.row import Row, RowRecord, measure_parts
from tdq_exp.experiment.sample_stage import (
    Reconstructions,
    SampledSet,
    SampleStage,
    run_sampling,
    store_of,
)
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.image_sets import Features, measure
from tdq_exp.runtime import environment, files
from tdq_exp.runtime.hashes import images_hash
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.stage import Result, stage


def run_measures(
    job: Experiment, data: Data, fit: FittedModel, sampling: SampleStage, processes: Processes
) -> tuple[dict[str, Any], bool]:
    """Return the row of a sampled set, and whether it is new.

    Images are sampled only where there is no row of them.

    Args:
        job: the experiment.
        data: real images.
        fit: whose row it is.
        sampling: the set.
        processes: who shares the work.
    """
    processes.decide(sampling.require_same)
    processes.decide(lambda: job.features().name)  # a download, or a complaint, happens once
    network = job.features()

    # The row is found by what it depends on.
    features = [network.name, network.weights_hash]
    evaluation = vars(job.evaluation)
    fingerprint = files.fingerprint(
        measure_parts(sampling.record.fingerprint, features, data.parts(), evaluation)
    )
    record = RowRecord(sampling.folder / "metrics.json", fingerprint)
    processes.decide(lambda: record.require_same(network.name, job.recorded()))

    def make() -> Result:
        images = run_sampling(job, sampling, processes)

        began = time.monotonic()
        measured = _measured(job, data, network, images, processes)
        paired = processes.decide(partial(_paired, job, sampling, images, processes))

        seconds = round(time.monotonic() - began, 1)
        found = Measured(fingerprint, measured, paired, seconds)
        return row_of(job, fit, sampling, images, found, processes).as_json()

    row, new = stage(record, make, processes)
    if not new:
        _confirm_images(job, sampling, row, processes)
    return row, new


@dataclass(frozen=True)
class Measured:
    """What was measured of a set.

    Args:
        fingerprint: of the measure stage.
        metrics: the fields of a row that `measure` gives.
        paired: distance to the float model's images from the same noise, or None.
        seconds: that it took.
    """

    fingerprint: str
    metrics: dict[str, Any]
    paired: dict[str, Any] | None
    seconds: float


def _measured(
    job: Experiment, data: Data, network: FeatureNetwork, images: SampledSet, processes: Processes
) -> dict[str, Any]:
    """Return the metrics of the set, and of as many real images."""
    options = job.evaluation
    return measure(
        Features(network, options.batch, processes, job.data.cache),
        images.pixels,
        data.train,
        data.held_out,
        options.metrics,
        options.reference_images,
        partial(Reconstructions, job.model, processes=processes) if job.model.codec else None,
    )


def _paired(
    job: Experiment, sampling: SampleStage, images: SampledSet, processes: Processes
) -> dict[str, Any] | None:
    """Return the distance to the float network's images from the same noise, or None."""
    return paired_distance(job, sampling.net, images, processes.device)


def row_of(
    job: Experiment,
    fit: FittedModel,
    sampling: SampleStage,
    images: SampledSet,
    measured: Measured,
    processes: Processes,
) -> Row:
    """Return the row of a measured set: what it is of, how long it took, and where it was made.

    Args:
        job: the experiment.
        fit: whose row it is.
        sampling: the stage of the set.
        images: the set.
        measured: what was measured of it.
        processes: who shared the work.
    """
    fingerprints = {
        "fit": fit.fingerprint,
        "sample": sampling.record.fingerprint,
        "measure": measured.fingerprint,
    }

    seconds = {
        "fit": fit.facts["seconds"],
        "sample": round(images.seconds, 1),
        "measure": measured.seconds,
    }

    # The images count: they may have been sampled, and the network fitted, somewhere else.
    here = place_of(processes)
    place = {**here, **(images.made or [here])[-1]}
    sampled_on = [other["environment"] for other in images.made]
    fitted_on = here["environment"]
    if not job.fit.options.loads_only:
        fitted_on = fit.facts.get("environment", fitted_on)

    return Row(
        name=job.name,
        seed=job.seed,
        sample=job.sample_name,
        report=job.fit.options.report,
        update=sampling.update,
        fingerprints=fingerprints,
        images=job.sampling.images,
        image_set=images_hash(images.pixels),
        weights=fit.facts["weights"],
        which_weights=fit.facts.get("which_weights"),
        model_parts=job.model.parts(),
        validation_loss=_validation_loss(fit.facts, sampling.update),
        seconds=seconds,
        peak_memory_gb=environment.peak_memory_gb(),
        processes=place["processes"],
        device=place["device"],
        threads=place["threads"],
        kernels=place["kernels"],
        engine=images.engine,
        environment=here["environment"],
        sampled_on=sampled_on if sampled_on != [here["environment"]] else None,
        fitted_on=fitted_on if fitted_on != here["environment"] else None,
        compiled=fit.facts.get("compiled"),
        config=job.recorded(),
        paired=measured.paired,
        **measured.metrics,
    )


def _validation_loss(facts: Mapping[str, Any], update: int | None) -> float | None:
    """Return the validation loss of a fit's last network, or of its checkpoint at an update."""
    if update is None:
        return facts["validation_loss"]
    return next((loss for u, loss in facts.get("validation", ()) if u == update), None)


def _confirm_images(
    job: Experiment, sampling: SampleStage, row: dict[str, Any], processes: Processes
) -> None:
    """Compare the images of a row that was there already with what the row says of them.

    Damaged ones are sampled again. Images may have been removed, as those of published rows are: a
    line says so.

    Raises:
        ValueError: if the images are not those that were measured.
    """
    folder = sampling.folder / "images"
    store = store_of(job, sampling.folder, sampling.record.fingerprint)

    # 1. The record of the set, which a row never is without.
    if processes.decide(lambda: sampling.record.begun() is None):
        _say(f"{sampling.record.file}: was missing, written again", processes)
        facts = {"seconds": row["seconds"]["sample"], "made": made_of(row)}
        if (engine := row.get("engine", SIMULATED)) != SIMULATED:
            facts["engine"] = engine
        processes.decide(lambda: sampling.record.write(facts))

    # 2. The images.
    if not processes.decide(folder.exists):
        _say(f"note: {folder} is not here; the row stands without its images", processes)
        return

    faults = processes.decide(store.faults)
    if faults:
        _say(f"{faults[0].partition(';')[0]}: sampled again", processes)
        run_sampling(job, sampling, processes)

    # 3. What was measured.
    measured = row.get("image_set")
    if measured is None:
        return

    found = processes.decide(lambda: images_hash(store.read()))
    if found != measured:
        raise ValueError(
            f"{folder}: not the images that were measured (hash {found}, the row says {measured});"
            f" remove {sampling.folder / 'metrics.json'} to measure these"
        )


def _say(line: str, processes: Processes) -> None:
    if processes.main:
        console.print(line)


def rows_file(job: Experiment) -> Path:
    """Return the file of a run's rows."""
    return job.folder / job.sample_name / "metrics.json"
