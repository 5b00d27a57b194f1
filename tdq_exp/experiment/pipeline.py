"""The stages of a run, in order: data -> fit -> sample -> measure -> row.

Every stage first looks for its own result under its fingerprint, so that running the same command
again does nothing twice, and goes on wherever it was stopped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tdq_exp.data.images import Data, load_images
from tdq_exp.experiment import show as pictures
from tdq_exp.experiment import verify
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.fit_stage import FittedModel, run_fit
from tdq_exp.experiment.measure_stage import run_measures
from tdq_exp.experiment.network import finished_net
from tdq_exp.experiment.row import write_row
from tdq_exp.experiment.sample_stage import sample_stage_of
from tdq_exp.fit.loop import best_file
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.tracking import Tracker


def run(job: Experiment) -> list[dict[str, Any]]:
    """Run every stage that is not done yet; return the row, or nothing for a pre-training."""
    launcher, tracking = job.machine.launcher, job.machine.tracker
    if launcher.threads:
        torch.set_num_threads(launcher.threads)

    processes = Processes(cpu=launcher.cpu)
    tracker: Tracker | None = None

    try:
        # What killed runs left behind.
        for place in (job.folder, job.data.cache):
            processes.decide(partial(files.sweep, place))

        data = load_data(job, processes)
        kind = tracking.kind if processes.main else "none"
        tracker = Tracker(
            kind, tracking.project, f"{job.name}/seed{job.seed}", job.folder, job.config
        )

        fit = run_fit(job, data, processes, tracker)

        # A fit without a row ends here.
        options, rows = job.fit.options, []
        if options.gives_rows:
            measured = best_of_checkpoints if options.chooses_checkpoint else last_network
            rows = [measured(job, data, fit, processes, tracker)]

        processes.decide(partial(_require_whole, job))
        return rows
    finally:
        if tracker is not None:
            tracker.close()
        processes.close()


def _require_whole(job: Experiment) -> None:
    """Refuse a run folder with a damaged file that no stage has made again.

    Raises:
        ValueError: naming the first one.
    """
    faults = verify.run_faults(job.folder, everything=False)
    faults = [fault for fault in faults if "migrate_records.py" not in fault]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")


def load_data(job: Experiment, processes: Processes) -> Data:
    """Return the images, decoded on the main process if need be; all of them read the same cache.

    Raises:
        ValueError: if the experiment was built without its data.
    """
    source = job.data.source
    if source is None:
        raise ValueError("data.source: this experiment was built without its data")

    def load(check: bool) -> Data:
        size, channels = job.model.image_size, job.model.channels
        read = partial(
            load_images,
            source,
            size=size,
            channels=channels,
            cache=job.config["data"]["cache"],
            limit=job.data.limit,
            check=check,
        )
        return Data(read("train"), read("validation"))

    # The main process writes and checks the cache; then all read it.
    processes.decide(lambda: load(check=True) and None)
    return load(check=False)


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
        file = best_file(job.folder, update)
        net = partial(finished_net, job, fit.fingerprint, processes.device, file)
        sampling = sample_stage_of(job, fit, folder / f"update{update}", net, update)
        row, new = run_measures(job, data, fit, sampling, processes)
        candidates.append(row)
        any_new = any_new or new

    best = dict(min(candidates, key=lambda row: row["metrics"]["fid"]))
    best["candidates"] = [{"update": r["update"], "metrics": r["metrics"]} for r in candidates]
    best = files.sealed(best)
    processes.decide(lambda: write_row(folder / "metrics.json", best))

    chosen = folder / f"update{best['update']}"
    pictures.publish(job, chosen, best, tracker if any_new else None, processes)
    return best
