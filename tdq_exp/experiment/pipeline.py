"""The stages of a run, in order: data -> fit -> sample -> measure -> row.

Every stage first looks for its own result under its fingerprint, so that running the same command
again does nothing twice, and goes on wherever it was stopped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tdq_exp.data.images import Data, Images, load_images
from tdq_exp.data.sources import Source
from tdq_exp.experiment import record_checks
from tdq_exp.experiment import show as pictures
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.fit_stage import FittedModel, run_fit
from tdq_exp.experiment.inputs import require_inputs
from tdq_exp.experiment.measure_stage import run_measures
from tdq_exp.experiment.row import write_row
from tdq_exp.experiment.sample_stage import sample_stage_of
from tdq_exp.experiment.stored_network import finished_net
from tdq_exp.fit.checkpoint import best_file
from tdq_exp.metrics.fidelity import METRICS
from tdq_exp.runtime import failures, files, lock
from tdq_exp.runtime.environment import out_of_memory_in_one_line
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.tracking import Tracker

IN_USE = "wait until it ends, or set label=NAME for a run of its own"
FEWEST = 2  # images of a distance: one has no covariance


@out_of_memory_in_one_line
def run(job: Experiment) -> list[dict[str, Any]]:
    """Run every stage that is not done yet; return the row, or nothing for a pre-training.

    An error is noted in the folder of the run, for `python -m tdq_exp status`.

    Raises:
        InUse: if another command works in the run's folder.
    """
    with failures.noted(job.folder):
        return _run(job)


def _run(job: Experiment) -> list[dict[str, Any]]:
    launcher = job.machine.launcher
    processes = Processes(cpu=launcher.cpu, threads=launcher.threads)

    try:
        processes.decide(lambda: require_inputs(job))
        if processes.main:
            for line in job.notes:
                console.print(f"note: {line}")
        # float32 is float32 on every device, unless a fit asks for less.
        with products("float32"), lock.by_main(processes, lock.held(job.folder, IN_USE)):
            # What killed runs left behind.
            for place in (job.folder, job.data.cache):
                processes.decide(partial(files.sweep, place))
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
        options, rows = job.fit.options, []
        if options.gives_rows:
            measured = best_of_checkpoints if options.chooses_checkpoint else last_network
            rows = [measured(job, data, fit, processes, tracker)]

        processes.decide(partial(_require_whole, job))
        return rows
    finally:
        tracker.close()


def _require_whole(job: Experiment) -> None:
    """Refuse a run folder with a damaged file that no stage has made again.

    Raises:
        ValueError: naming the first one.
    """
    faults = record_checks.run_faults(job.folder, everything=False)
    faults = [fault for fault in faults if "migrate_records.py" not in fault]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")


def load_data(job: Experiment, processes: Processes) -> Data:
    """Return the images, decoded on the main process if need be; all of them read the same cache.

    Raises:
        ValueError: if the experiment was built without its data.
    """
    source = _source(job)

    def first() -> None:
        """Decode what is not decoded yet, and refuse sets that no distance can be measured on."""
        data = read_data(job)
        for line in source.notes:
            console.print(f"note: {line}")
        if job.fit.options.gives_rows:
            _check_numbers(job)
            _check_sizes(data, max(METRICS[name].least for name in job.evaluation.metrics))
            if getattr(source, "in_subfolders", False):
                for line in _cut_notes(job, data):
                    console.print(f"note: {line}")

    # The main process writes and checks the cache; then all read it.
    processes.decide(first)
    return read_data(job, check=False)


def read_data(job: Experiment, check: bool = True) -> Data:
    """Return the images that an experiment names, decoded if need be, in this process alone.

    Args:
        job: built with its data.
        check: whether the pixels are compared with their hash; False where another process did it.

    Raises:
        ValueError, OSError: for an unreadable source or image, naming it, or none at all.
    """
    source = _source(job)
    read = partial(
        load_images,
        source,
        size=job.model.image_size,
        channels=job.model.channels,
        cache=str(job.data.cache),
        limit=job.data.limit,
        check=check,
    )
    sets = {split: read(split) for split in ("train", "validation")}

    # Classes only where the model asks for them: they are part of what the images are.
    classes = job.model.classes
    if classes is not None:
        sets = {name: images.labelled(source.labels(name)) for name, images in sets.items()}
        for images in sets.values():
            require_classes(images, classes)

    return Data(sets["train"], sets["validation"])


def _source(job: Experiment) -> Source:
    if job.data.source is None:
        raise ValueError("data.source: this experiment was built without its data")
    return job.data.source


def require_classes(images: Images, classes: int) -> None:
    """Refuse images of classes that a class-conditional model does not have.

    Raises:
        ValueError: naming the key.
    """
    assert images.labels is not None
    unknown = int((images.labels < 0).sum())
    if unknown:
        raise ValueError(
            f"data.source: {unknown} of {len(images)} images have no class (a label below 0), and"
            " the model is class-conditional; name a split that has them"
        )

    largest = int(images.labels.max())
    if largest >= classes:
        raise ValueError(
            f"model.definition.network.num_class_embeds={classes}: the images have classes up to"
            f" {largest}; set it to at least {largest + 1}"
        )


def _check_numbers(job: Experiment) -> None:
    """Refuse numbers of images on which a metric is undefined, before a fit of days.

    Raises:
        ValueError: naming the key.
    """
    numbers = {
        "sampler.images": job.sampling.images,
        "eval.reference_images": job.evaluation.reference_images,
    }
    for name in job.evaluation.metrics:
        for key, number in numbers.items():
            least, compares = METRICS[name].least, METRICS[name].compares
            if key == "eval.reference_images" and not compares:
                continue
            if number is not None and number < least:
                raise ValueError(
                    f"{key}={number}: {name} needs at least {least} images; take more, or leave"
                    f" {name} out of eval.metrics"
                )


def _cut_notes(job: Experiment, data: Data) -> list[str]:
    """Return a line if a distance is of the first images of a set, which is sorted by folders."""
    train, held_out = len(data.train), len(data.held_out)
    cuts = {
        "data.limit": (job.data.limit, train + 1),
        "eval.reference_images": (job.evaluation.reference_images, train),
        "sampler.images": (job.sampling.images, held_out),
    }
    named = [f"{key}={n}" for key, (n, every) in cuts.items() if n is not None and n < every]
    if not named:
        return []
    return [
        f"{', '.join(named)}: the first real images alone are measured, and data.source.path is"
        " sorted by its subfolders: the last of them may have no share; put all files into one"
        " folder, in a mixed order, if these are classes"
    ]


def _check_sizes(data: Data, fewest: int = FEWEST) -> None:
    """Refuse sets of fewer images than a distance needs, before a fit of days.

    Args:
        data: the images.
        fewest: images that the chosen metrics need; never below `FEWEST`.

    Raises:
        ValueError: naming the key.
    """
    fewest = max(fewest, FEWEST)
    train, held_out = len(data.train), len(data.held_out)
    total = train + held_out

    if held_out < fewest and total >= 2 * fewest:
        every = min((total - 1) // (fewest - 1), 5)  # the rest, rounded up, is held out
        raise ValueError(
            f"data.source.holdout: {held_out} of {total} images is held out, and a"
            f" distance needs at least {fewest}; data.source.holdout={every} holds every"
            f" {every}th one out"
        )
    if min(train, held_out) < fewest:
        raise ValueError(
            f"data.source: {train} images to train on and {held_out} held out, and a distance needs"
            f" at least {fewest} of each; take more images, or a larger data.limit"
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
        file = best_file(job.folder, update)
        net = partial(finished_net, job, fit.fingerprint, processes.device, file)
        sampling = sample_stage_of(job, fit, folder / f"update{update}", net, update)
        row, new = run_measures(job, data, fit, sampling, processes)
        candidates.append(row)
        any_new = any_new or new

    best = dict(min(candidates, key=lambda row: row["metrics"]["fid"]))
    # All of them were sampled and measured for this row; the fit is one.
    best["seconds"] = best["seconds"] | {
        stage: round(sum(row["seconds"][stage] for row in candidates), 1)
        for stage in ("sample", "measure")
    }
    best["candidates"] = [{"update": r["update"], "metrics": r["metrics"]} for r in candidates]
    best = files.sealed(best)
    processes.decide(lambda: write_row(folder / "metrics.json", best))

    chosen = folder / f"update{best['update']}"
    pictures.publish(job, chosen, best, tracker if any_new else None, processes)
    return best
