"""The stages of a run, in order: data -> fit -> sample -> measure -> row.

Every stage first looks for its own result under its fingerprint, so that running the same command
again does nothing twice, and goes on wherever it was stopped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tdq_exp.data.images import Data, Images, load_images
from tdq_exp.experiment import show as pictures
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.fit_stage import FittedModel, finished_net, run_fit
from tdq_exp.experiment.inputs import require_inputs
from tdq_exp.experiment.measure_stage import run_measures
from tdq_exp.experiment.row import write_row
from tdq_exp.experiment.sample_stage import sample_stage_of
from tdq_exp.fit.loop import best_file
from tdq_exp.runtime import lock
from tdq_exp.runtime.environment import out_of_memory_in_one_line
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.tracking import Tracker

IN_USE = "wait until it ends, or set label=NAME for a run of its own"


@out_of_memory_in_one_line
def run(job: Experiment) -> list[dict[str, Any]]:
    """Run every stage that is not done yet; return the row, or nothing for a pre-training.

    Raises:
        InUse: if another command works in the run's folder.
    """
    launcher = job.machine.launcher
    if launcher.threads:
        torch.set_num_threads(launcher.threads)

    processes = Processes(cpu=launcher.cpu)

    try:
        processes.decide(lambda: require_inputs(job))
        with lock.by_main(processes, lock.held(job.folder, IN_USE)):
            return _run_stages(job, processes)
    finally:
        processes.close()


def _run_stages(job: Experiment, processes: Processes) -> list[dict[str, Any]]:
    data = load_data(job, processes)

    tracking = job.machine.tracker
    kind = tracking.kind if processes.main else "none"
    tracker = Tracker(kind, tracking.project, f"{job.name}/seed{job.seed}", job.folder, job.config)

    try:
        fit = run_fit(job, data, processes, tracker)

        # A fit without a row ends here.
        if not job.fit.options.gives_rows:
            return []
        if job.fit.options.chooses_checkpoint:
            return [best_of_checkpoints(job, data, fit, processes, tracker)]
        return [last_network(job, data, fit, processes, tracker)]
    finally:
        tracker.close()


def load_data(job: Experiment, processes: Processes) -> Data:
    """Return the images, decoded on the main process if need be; all of them read the same cache.

    Raises:
        ValueError: if the experiment was built without its data.
    """
    source = job.data.source
    if source is None:
        raise ValueError("data.source: this experiment was built without its data")

    def load() -> Data:
        size, channels = job.model.image_size, job.model.channels
        read = partial(
            load_images,
            source,
            size=size,
            channels=channels,
            cache=str(job.data.cache),
            limit=job.data.limit,
        )
        sets = {split: read(split) for split in ("train", "validation")}

        # Classes only where the model asks for them: they are part of what the images are.
        classes = job.model.classes
        if classes is not None:
            sets = {name: images.labelled(source.labels(name)) for name, images in sets.items()}
            require_classes(sets["train"], classes)

        return Data(sets["train"], sets["validation"])

    # The main process writes the cache; then all read it.
    processes.decide(lambda: load() and None)
    return load()


def require_classes(images: Images, classes: int) -> None:
    """Refuse images of classes that a class-conditional model does not have.

    Raises:
        ValueError: naming the key.
    """
    assert images.labels is not None
    largest = int(images.labels.max())
    if largest >= classes:
        raise ValueError(
            f"model.definition.network.num_class_embeds={classes}: the images have classes up to"
            f" {largest}; set it to at least {largest + 1}"
        )


def last_network(
    job: Experiment, data: Data, fit: FittedModel, processes: Processes, tracker: Tracker
) -> dict[str, Any]:
    """Return the row of the fit's last network."""
    folder = job.folder / job.sample_name
    row, new = run_measures(job, data, fit, sample_stage_of(job, fit, folder, fit.net), processes)
    pictures.publish(job, folder, row, tracker if new else None, processes)
    return row


def best_of_checkpoints(
    job: Experiment, data: Data, fit: FittedModel, processes: Processes, tracker: Tracker
) -> dict[str, Any]:
    """Return the row of the checkpoint with the smallest distance; every candidate has its own."""
    folder = job.folder / job.sample_name
    candidates, any_new = [], False

    for update in fit.facts["best"]:
        net = partial(finished_net, job, processes.device, best_file(job.folder, update))
        sampling = sample_stage_of(job, fit, folder / f"update{update}", net, update)
        row, new = run_measures(job, data, fit, sampling, processes)
        candidates.append(row)
        any_new = any_new or new

    best = dict(min(candidates, key=lambda row: row["metrics"]["fid"]))
    best["candidates"] = [{"update": r["update"], "metrics": r["metrics"]} for r in candidates]
    processes.decide(lambda: write_row(folder / "metrics.json", best))

    chosen = folder / f"update{best['update']}"
    pictures.publish(job, chosen, best, tracker if any_new else None, processes)
    return best
