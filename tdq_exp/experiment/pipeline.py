"""The road of a run: build -> quantize -> calibrate -> fit -> bake -> generate -> measure -> record.

Every stage first looks for its own result under its fingerprint, so that running the same command again does nothing
twice, and goes on wherever it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.data.images import load_images
from tdq_exp.experiment import sample_stage
from tdq_exp.experiment.build import Job
from tdq_exp.experiment.fit_stage import Data, Fit, cache_folder, finished_net, fitted
from tdq_exp.fit.loop import best_file
from tdq_exp.metrics import VALUES
from tdq_exp.metrics.measure import measure
from tdq_exp.quant import kernels
from tdq_exp.runtime import environment, figures, files, stage
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, print_table
from tdq_exp.runtime.tracking import Tracker

REAL_NAMES = {"held_out": "real, held out", "reconstructed": "real, reconstructed"}


def run(job: Job) -> list[dict[str, Any]]:
    """Runs every stage of a job that is not done yet; returns its rows (none for a pre-training)."""
    if job.launcher.threads:
        torch.set_num_threads(job.launcher.threads)
    processes = Processes(cpu=job.launcher.cpu)
    tracker: Tracker | None = None
    try:
        data = load_data(job, processes)
        kind = job.tracker.kind if processes.main else "none"
        tracker = Tracker(kind, job.tracker.project, f"{job.name}/seed{job.seed}", job.folder, job.config)
        fit = fitted(job, data, processes, tracker)
        if job.fit.kind == "pretrain":
            return []
        return evaluate(job, data, fit, processes, tracker)
    finally:
        if tracker is not None:
            tracker.close()
        processes.close()


def load_data(job: Job, processes: Processes) -> Data:
    """Decodes on the main process if need be; all of them read the same cache."""

    assert job.source is not None
    source = job.source

    def load() -> Data:
        sets = [
            load_images(
                source, split, size=job.model.image_size, channels=job.model.channels, cache=job.cache, limit=job.limit
            )
            for split in ("train", "validation")
        ]
        return Data(*sets)

    processes.decide(lambda: load() and None)
    return load()


def evaluate(job: Job, data: Data, fit: Fit, processes: Processes, tracker: Tracker) -> list[dict[str, Any]]:
    """Samples and measures a finished fit: one row, or with `best_of_5` the best of five by the distance itself."""
    folder = job.folder / job.sample_name
    if job.fit.report == "last":
        row, measured = _row(job, data, fit, folder, fit.net, processes)
    else:
        candidates, measured = [], False
        for update in fit.facts["best"]:
            net = partial(finished_net, job, processes.device, best_file(job.folder, update))
            candidate, new = _row(job, data, fit, folder / f"update{update}", net, processes, update)
            candidates.append(candidate)
            measured = measured or new
        row = dict(min(candidates, key=lambda r: r["metrics"]["fid"]))
        row["candidates"] = [{"update": r["update"], "metrics": r["metrics"]} for r in candidates]
        processes.decide(lambda: _add_row(folder / "metrics.json", row))
        folder = folder / f"update{row['update']}"
    processes.decide(lambda: _pictures(job, fit, folder, row, processes))
    if measured:
        tracker.summary({**row["metrics"], **_real(row), "features": row["features"], "images": row["images"]})
        tracker.picture("samples", folder / "grid.png")
    return [row]


def _row(
    job: Job,
    data: Data,
    fit: Fit,
    folder: Path,
    net: Callable[[], nn.Module],
    processes: Processes,
    update: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """The row of one sampled set, and whether it is new; images and metrics that are there are not made again."""
    parts = {"fit": fit.fingerprint, "report": job.fit.report, "update": update, **job.part("sampler")}
    record_file = folder / "samples.json"
    found = processes.decide(lambda: stage.check_same(record_file, parts, keep="sampler.label"))
    sample_mark = files.fingerprint(parts)
    processes.decide(lambda: job.features().name)  # a download, or a complaint, happens once
    network = job.features()
    measure_parts = {
        "sample": sample_mark, "features": [network.name, network.weights_hash], "data": data.parts(),
        "metrics": sorted(job.evaluation.metrics), "batch": job.evaluation.batch,
        "reference_images": job.evaluation.reference_images,
    }  # fmt: skip
    mark = files.fingerprint(measure_parts)
    rows = (processes.decide(lambda: files.read_json(folder / "metrics.json")) or {"rows": []})["rows"]
    for row in rows:
        if row["fingerprints"]["measure"] == mark:
            return row, False
    if found is None and processes.decide((folder / "images").exists):
        raise ValueError(f"{folder / 'images'}: images that no samples.json speaks of; remove them to sample again")
    earlier: float = found["seconds"] if found else 0.0

    def note(seconds: float) -> None:  # group by group, so that what a killed run took counts too
        files.write_json(record_file, {"fingerprint": sample_mark, "parts": parts, "seconds": earlier + seconds})

    processes.decide(lambda: note(0.0))
    size = job.model.image_size
    store = ImageStore(folder / "images", job.sampling.images, job.sampling.batch, (size, size, job.model.channels))
    running, engine = sample_stage.engine(
        net(), job.model, job.sampling.engine, batch=job.sampling.batch, min_speedup=job.sampling.min_speedup,
        folder=folder, processes=processes,
    )  # fmt: skip
    spent = earlier + sample_stage.sample_set(
        running, job.model, job.sampler, store, seed=job.sampling.seed, processes=processes,
        truncate=job.sampling.truncate, on_group=note,
    )  # fmt: skip
    processes.decide(lambda: note(spent - earlier))
    if job.sampling.png and processes.main:
        sample_stage.write_pngs(store.read(), folder / "png")
    begun = time.monotonic()
    measured = measure(
        network, store.read(), data.train, data.held_out, job.evaluation.metrics, job.evaluation.batch, processes,
        cache_folder(job), job.evaluation.reference_images,
        partial(sample_stage.Reconstructions, job.model, processes=processes) if job.model.lossy else None,
    )  # fmt: skip
    row = {
        "name": job.name, "seed": job.seed, "sample": job.sample_name, "report": job.fit.report, "update": update,
        "fingerprints": {"fit": fit.fingerprint, "sample": sample_mark, "measure": mark},
        "images": job.sampling.images, "weights": fit.facts["weights"], **job.model.parts(), "validation_loss": fit.facts["validation_loss"],
        "seconds": {"fit": fit.facts["seconds"], "sample": round(spent, 1),
                    "measure": round(time.monotonic() - begun, 1)},
        "peak_memory_gb": environment.peak_memory_gb(), "processes": processes.world, "device": processes.device.type,
        "threads": torch.get_num_threads(), "kernels": kernels.used(processes.device), "engine": engine,
        "environment": environment.environment(),
        "config": job.recorded(),
        **measured,
    }  # fmt: skip
    processes.decide(lambda: _add_row(folder / "metrics.json", row))
    return row, True


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to its file, in place of an older one of the same features."""
    rows = (files.read_json(path) or {"rows": []})["rows"]
    others = [r for r in rows if r["features"]["name"] != row["features"]["name"]]
    files.write_json(path, {"rows": sorted([*others, row], key=lambda r: r["features"]["name"])})


def _real(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of real images in a row."""
    return {kind: row[kind] for kind in REAL_NAMES if kind in row}


def _pictures(job: Job, fit: Fit, folder: Path, row: dict[str, Any], processes: Processes) -> None:
    """A grid of samples; for a quantized net below the float net's samples from the same noise."""
    path = folder / "grid.png"
    if path.exists():
        return
    size = job.model.image_size
    shape = (size, size, job.model.channels)
    images = ImageStore(folder / "images", job.sampling.images, job.sampling.batch, shape).read()
    features = f"{row['features']['name']} features {row['features']['weights']}"
    name, value = next((VALUES[key].label, value) for key, value in row["metrics"].items() if key in VALUES)
    title = f"{job.name}, {name} {value:.4g} ({features}, {row['images']} images)"
    rows = {title: images[: job.sampling.batch]}
    if job.recipe is not None and job.weights is not None:
        net = job.model.build()
        job.model.load(net, job.weights, job.ema)
        rows = {
            "float, same noise": sample_stage.sample_group(
                net.to(processes.device).eval(), job.model, job.sampler, range(job.sampling.batch),
                seed=job.sampling.seed, device=processes.device, truncate=job.sampling.truncate,
            ),
            **rows,
        }  # fmt: skip
    figures.sample_grid(rows, path)


def _float_row(job: Job, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The float model's row of the same sampler, if there is one beside this run."""
    folder = job.folder.parents[1] / f"{job.config['model']['label']}_fp" / f"seed{job.seed}" / job.sample_name
    found = files.read_json(folder / "metrics.json") or {"rows": []}
    same = [r for r in found["rows"] if r["features"] == row["features"] and r["images"] == row["images"]]
    return [r for r in same if r["name"] != row["name"]]


def show(job: Job, rows: list[dict[str, Any]]) -> None:
    """Prints what came out, as a small table, and where it lies."""
    if not rows:
        where = f", {job.fit.export}" if job.fit.export else ""
        console.print(f"{job.name}: weights in {job.folder / 'weights.safetensors'}{where}")
        return
    (row,) = rows
    features = row["features"]
    names = {key: value.label for key, value in VALUES.items() if key in row["metrics"]}
    others = [row, *_float_row(job, row)]
    lines = [
        *([r["name"], r["images"], *(r["metrics"][key] for key in names)] for r in others),
        *([REAL_NAMES[kind], real["images"], *(real[key] for key in names)] for kind, real in _real(row).items()),
    ]
    print_table(f"{features['name']} features ({features['weights']})", ["", "images", *names.values()], lines)
    folder = job.folder / job.sample_name
    console.print(f"row      {folder / 'metrics.json'}")
    for path in sorted(folder.rglob("grid.png")):
        console.print(f"samples  {path}")
    if (job.folder / "intervals.png").exists():
        console.print(f"steps    {job.folder / 'intervals.png'}")
