"""The road of a run: build -> quantize -> calibrate -> fit -> bake -> generate -> measure -> record.

Every stage first looks for its own result under its fingerprint, so that running the same command again does nothing
twice, and goes on wherever it was stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp import figures, record, sampling
from tdq_exp.data.images import Images, default_cache, load_images
from tdq_exp.data.store import ImageStore
from tdq_exp.fit.loop import History, Log, best_file
from tdq_exp.fit.pretrain import pretrain
from tdq_exp.fit.qat import interval_tables, qat, quantized_and_calibrated
from tdq_exp.job import Job
from tdq_exp.metrics.measure import measure
from tdq_exp.models.checkpoints import load_weights, save_weights
from tdq_exp.processes import Processes
from tdq_exp.progress import console, print_table
from tdq_exp.quant.convert import Recipe, bake, layer_map, quantize
from tdq_exp.tracking import Tracker

METRIC_NAMES = {
    "fid": "Frechet distance",
    "isc_mean": "inception-style score",
    "kid_mean": "kernel distance",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class Data:
    """Training and held-out images."""

    train: Images
    held_out: Images

    def parts(self) -> dict[str, Any]:
        """For fingerprints: what the pixels are, never where they lie."""
        return {"train": self.train.content, "held_out": self.held_out.content, "protocol": self.train.protocol}


@dataclass(frozen=True)
class Fit:
    """A finished fit: the net to sample from (made when it is first wanted), its fingerprint, and what the row cites."""

    net: Callable[[], nn.Module]
    fingerprint: str
    facts: dict[str, Any]


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
            load_images(source, split, size=job.model.image_size, channels=job.model.channels, cache=job.cache)
            for split in ("train", "validation")
        ]
        return Data(*sets)

    processes.decide(lambda: load() and None)
    return load()


def cache_folder(job: Job) -> Path:
    """Where decoded images, calibrations and features of real images are kept between runs."""
    return Path(job.cache).expanduser() if job.cache else default_cache()


def float_net(job: Job, processes: Processes) -> tuple[nn.Module, str]:
    """The float network with its weights, and their hash."""
    assert job.weights is not None
    net = job.model.build()
    weights = job.weights
    found = processes.decide(lambda: job.model.load(net, weights, job.ema))  # downloads, if at all, happen here
    if not processes.main:
        job.model.load(net, weights, job.ema)
    return net.to(processes.device).eval(), found


def fitted(job: Job, data: Data, processes: Processes, tracker: Tracker) -> Fit:
    """The network of a run: loaded, trained, or found where an earlier run left it."""
    net, weights = (None, None) if job.fit.kind == "pretrain" else float_net(job, processes)
    parts = fit_parts(job, data, weights)
    file = job.folder / "fit.json"
    found = processes.decide(lambda: record.check_same(file, parts))
    mark = record.fingerprint(parts)
    if job.fit.export is not None and not (found and found["done"]) and Path(job.fit.export).expanduser().exists():
        raise ValueError(f"fit.export={job.fit.export}: exists; remove it or choose another name")  # not after an hour
    if found is None:
        begun = {"name": job.name, "fingerprint": mark, "parts": parts, "config": job.recorded(), "done": False}
        processes.decide(lambda: record.write(file, begun))
    if found is not None and found["done"]:
        if job.fit.kind == "pretrain" and job.fit.export is not None:
            processes.decide(lambda: _export(job))
        loaded = net if job.fit.kind == "none" else None
        # Read when it is wanted: where the row is there already, as in a fresh clone, there need not be a net.
        return Fit(lambda: loaded or finished_net(job, processes.device), mark, found["facts"])
    log: Log | None = tracker.log if processes.main else None
    facts: dict[str, Any] = {"weights": weights, "seconds": 0.0, "validation_loss": None}
    if job.fit.kind == "pretrain":
        assert job.train is not None
        average, history = pretrain(
            job.model, data.train, data.held_out, job.train, lr=job.fit.lr, seed=job.seed, folder=job.folder,
            mark=mark, processes=processes, log=log,
        )  # fmt: skip
        processes.decide(lambda: _ship(job, average, history))
        net = average
    elif job.fit.kind == "qat":
        net, history = _quantized_training(job, data, net, weights, mark, processes, log)  # type: ignore[arg-type]
        tables = interval_tables(net)
        title = f"{job.name}: step sizes over time"
        processes.decide(lambda: figures.intervals_over_time(tables, job.folder / "intervals.png", title))
        tracker.intervals(tables)
        tracker.picture("intervals", job.folder / "intervals.png")
        baked = bake(net)
        processes.decide(lambda: save_weights(baked, job.folder / "baked.safetensors", {"fit": mark}))
        net = baked
    if job.fit.kind != "none":
        facts |= {
            "seconds": round(history.seconds, 1), "validation_loss": history.validation[-1][1],
            "validation": history.validation, "best": [update for _, update in sorted(history.best)],
            "processes": processes.world, "peak_memory_gb": record.peak_memory_gb(),
        }  # fmt: skip
    facts["environment"] = record.environment()
    about = {"name": job.name, "fingerprint": mark, "parts": parts, "config": job.recorded()}
    processes.decide(lambda: record.write(file, {**about, "done": True, "facts": facts}))
    assert net is not None
    made: nn.Module = net
    return Fit(lambda: made, mark, facts)


def fit_parts(job: Job, data: Data, weights: str | None) -> dict[str, Any]:
    """What a fit depends on. A float model that is only loaded depends on its weights alone."""
    parts: dict[str, Any] = {"weights": weights, **job.part("model")}
    if job.fit.kind == "none":
        return parts
    parts |= {"data": data.parts(), "seed": job.seed, **job.part("fit")}
    if job.recipe is not None:
        parts |= job.part("bits", "weight", "act", "tdq", "plan", "habits")
    return parts


def _quantized_training(
    job: Job, data: Data, net: nn.Module, weights: str, mark: str, processes: Processes, log: Log | None
) -> tuple[nn.Module, History]:
    assert job.train is not None and job.recipe is not None
    samples = job.fit.calibration_samples
    key = {
        "version": 2,  # of the search for start values
        "weights": weights, "data": data.parts(), "samples": samples, "seed": job.seed,
        **job.part("model", "bits", "weight", "act", "tdq", "plan", "habits"),
    }  # fmt: skip
    net = quantized_and_calibrated(
        net, job.model, job.recipe, data.train, samples=samples, seed=job.seed, processes=processes,
        cache=cache_folder(job), key=key,
    )  # fmt: skip
    processes.decide(lambda: _write_layer_map(job, net))
    return qat(
        net, job.model, data.train, data.held_out, job.train, job.rates, real_rounding=job.fit.real_rounding,
        seed=job.seed, folder=job.folder, mark=mark, processes=processes, log=log,
    )  # fmt: skip


def _write_layer_map(job: Job, net: nn.Module) -> None:
    rows = layer_map(net, job.model.roles(job.model.build()))
    quantized = sum(row["weight"] not in ("float", "-") for row in rows)
    leaves = sum(row["weight"] != "-" for row in rows)
    record.write(job.folder / "layers.json", {"quantized_leaves": quantized, "leaves": leaves, "layers": rows})


def _ship(job: Job, net: nn.Module, history: History) -> None:
    """Writes a pre-trained net, and where `fit.export` says a second time."""
    path = job.folder / "weights.safetensors"
    about = {"validation_loss": repr(history.validation[-1][1]), "updates": str(history.validation[-1][0])}
    save_weights(net, path, about)
    if job.fit.export is not None:
        _export(job)


def _export(job: Job) -> None:
    path, target = job.folder / "weights.safetensors", Path(str(job.fit.export)).expanduser()
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise ValueError(f"fit.export={target}: exists and is another net; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def finished_net(job: Job, device: torch.device, checkpoint: Path | None = None) -> nn.Module:
    """The baked net of a finished fit, or of one of its checkpoints.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, or is not of this fit.
    """
    if job.fit.kind == "pretrain":
        net = job.model.build()
        load_weights(net, str(job.folder / "weights.safetensors"))
        return net.to(device).eval()
    assert job.recipe is not None
    net = skeleton(job, job.recipe)
    if checkpoint is not None:
        load_weights(net, str(checkpoint))
        return bake(net).to(device)
    net = bake(net)
    load_weights(net, str(job.folder / "baked.safetensors"))
    return net.to(device)


def skeleton(job: Job, recipe: Recipe) -> nn.Module:
    """The quantized network before calibration: the right modules, any numbers."""
    net = job.model.build()
    quantize(net, job.model.roles(net), recipe, job.model.schedule.steps)
    for module in net.modules():
        if hasattr(module, "start") and hasattr(module, "interval"):
            module.start(1.0, 0)  # type: ignore[operator]
    return net.eval()


def evaluate(job: Job, data: Data, fit: Fit, processes: Processes, tracker: Tracker) -> list[dict[str, Any]]:
    """Samples and measures a finished fit: one row, or with `best_of_5` the best of five by the distance itself."""
    folder = job.folder / job.sample_name
    if job.fit.report == "last":
        row = _row(job, data, fit, folder, fit.net, processes)
    else:
        candidates = []
        for update in fit.facts["best"]:
            net = partial(finished_net, job, processes.device, best_file(job.folder, update))
            candidates.append(_row(job, data, fit, folder / f"update{update}", net, processes, update))
        row = dict(min(candidates, key=lambda r: r["metrics"]["fid"]))
        row["candidates"] = [{"update": r["update"], "metrics": r["metrics"]} for r in candidates]
        processes.decide(lambda: _add_row(folder / "metrics.json", row))
        folder = folder / f"update{row['update']}"
    processes.decide(lambda: _pictures(job, fit, folder, row, processes))
    tracker.summary(
        {**row["metrics"], "held_out": row["held_out"], "features": row["features"], "images": row["images"]}
    )
    if processes.main:
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
) -> dict[str, Any]:
    """The row of one sampled set; images and metrics that are there already are not made again."""
    parts = {"fit": fit.fingerprint, "report": job.fit.report, "update": update, **job.part("sampler")}
    stage = folder / "samples.json"
    found = processes.decide(lambda: record.check_same(stage, parts, keep="sampler.label"))
    sample_mark = record.fingerprint(parts)
    processes.decide(lambda: job.features().name)  # a download, or a complaint, happens once
    network = job.features()
    measure_parts = {
        "sample": sample_mark, "features": [network.name, network.weights_hash], "data": data.parts(),
        "metrics": sorted(job.evaluation.metrics), "batch": job.evaluation.batch,
        "reference_images": job.evaluation.reference_images,
    }  # fmt: skip
    mark = record.fingerprint(measure_parts)
    rows = (processes.decide(lambda: record.read(folder / "metrics.json")) or {"rows": []})["rows"]
    for row in rows:
        if row["fingerprints"]["measure"] == mark:
            return row
    if found is None and processes.decide((folder / "images").exists):
        raise ValueError(f"{folder / 'images'}: images that no samples.json speaks of; remove them to sample again")
    earlier: float = found["seconds"] if found else 0.0
    processes.decide(lambda: record.write(stage, {"fingerprint": sample_mark, "parts": parts, "seconds": earlier}))
    size = job.model.image_size
    store = ImageStore(folder / "images", job.sampling.images, job.sampling.batch, (size, size, job.model.channels))
    spent = earlier + sampling.sample_set(
        net(), job.model, job.sampler, store, seed=job.sampling.seed, processes=processes,
        truncate=job.sampling.truncate,
    )  # fmt: skip
    processes.decide(lambda: record.write(stage, {"fingerprint": sample_mark, "parts": parts, "seconds": spent}))
    if job.sampling.png and processes.main:
        sampling.write_pngs(store.read(), folder / "png")
    begun = time.monotonic()
    measured = measure(
        network, store.read(), data.train, data.held_out, job.evaluation.metrics, job.evaluation.batch, processes,
        cache_folder(job), job.evaluation.reference_images,
    )  # fmt: skip
    row = {
        "name": job.name, "seed": job.seed, "sample": job.sample_name, "report": job.fit.report, "update": update,
        "fingerprints": {"fit": fit.fingerprint, "sample": sample_mark, "measure": mark},
        "images": job.sampling.images, "weights": fit.facts["weights"], "validation_loss": fit.facts["validation_loss"],
        "seconds": {"fit": fit.facts["seconds"], "sample": round(spent, 1),
                    "measure": round(time.monotonic() - begun, 1)},
        "peak_memory_gb": record.peak_memory_gb(), "processes": processes.world, "device": processes.device.type,
        "threads": torch.get_num_threads(), "environment": record.environment(),
        "config": job.recorded(),
        **measured,
    }  # fmt: skip
    processes.decide(lambda: _add_row(folder / "metrics.json", row))
    return row


def _add_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to its file, in place of an older one of the same features."""
    rows = (record.read(path) or {"rows": []})["rows"]
    others = [r for r in rows if r["features"]["name"] != row["features"]["name"]]
    record.write(path, {"rows": sorted([*others, row], key=lambda r: r["features"]["name"])})


def _pictures(job: Job, fit: Fit, folder: Path, row: dict[str, Any], processes: Processes) -> None:
    """A grid of samples; for a quantized net below the float net's samples from the same noise."""
    path = folder / "grid.png"
    if path.exists():
        return
    size = job.model.image_size
    shape = (size, size, job.model.channels)
    images = ImageStore(folder / "images", job.sampling.images, job.sampling.batch, shape).read()
    features = f"{row['features']['name']} features {row['features']['weights']}"
    name, value = next((METRIC_NAMES[key], value) for key, value in row["metrics"].items() if key in METRIC_NAMES)
    title = f"{job.name}, {name} {value:.4g} ({features}, {row['images']} images)"
    rows = {title: images[: job.sampling.batch]}
    if job.recipe is not None and job.weights is not None:
        net = job.model.build()
        job.model.load(net, job.weights, job.ema)
        rows = {
            "float, same noise": sampling.sample_group(
                net.to(processes.device).eval(), job.model, job.sampler, range(job.sampling.batch),
                seed=job.sampling.seed, device=processes.device, truncate=job.sampling.truncate,
            ),
            **rows,
        }  # fmt: skip
    figures.sample_grid(rows, path)


def _float_row(job: Job, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The float model's row of the same sampler, if there is one beside this run."""
    folder = job.folder.parents[1] / f"{job.config['model']['label']}_fp" / f"seed{job.seed}" / job.sample_name
    found = record.read(folder / "metrics.json") or {"rows": []}
    same = [r for r in found["rows"] if r["features"] == row["features"] and r["images"] == row["images"]]
    return [r for r in same if r["name"] != row["name"]]


def show(job: Job, rows: list[dict[str, Any]]) -> None:
    """Prints what came out, as a small table, and where it lies."""
    if not rows:
        where = f", {job.fit.export}" if job.fit.export else ""
        console.print(f"{job.name}: weights in {job.folder / 'weights.safetensors'}{where}")
        return
    (row,) = rows
    features, held_out = row["features"], row["held_out"]
    names = {key: name for key, name in METRIC_NAMES.items() if key in row["metrics"]}
    others = [row, *_float_row(job, row)]
    lines = [
        *([r["name"], r["images"], *(r["metrics"][key] for key in names)] for r in others),
        ["real, held out", held_out["images"], *(held_out[key] for key in names)],
    ]
    print_table(f"{features['name']} features ({features['weights']})", ["", "images", *names.values()], lines)
    folder = job.folder / job.sample_name
    console.print(f"row      {folder / 'metrics.json'}")
    for path in sorted(folder.rglob("grid.png")):
        console.print(f"samples  {path}")
    if (job.folder / "intervals.png").exists():
        console.print(f"steps    {job.folder / 'intervals.png'}")
