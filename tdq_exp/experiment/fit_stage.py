"""The first half of a run's road: a float network loaded or trained, quantized, calibrated, fitted and baked.

A fit is looked for under its fingerprint before anything is computed, and goes on wherever it was stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.data.images import Images, default_cache
from tdq_exp.diffusion.draws import Stream, fixed_draws
from tdq_exp.diffusion.objective import Samples
from tdq_exp.experiment.build import Job
from tdq_exp.experiment.first_layer import first_range, noise_beyond
from tdq_exp.fit.calibrated import BATCH, Shown, drawn, of_set, quantized_and_calibrated
from tdq_exp.fit.loop import History, Log, validation_loss
from tdq_exp.fit.pretrain import pretrain
from tdq_exp.fit.ptq.calibration_set import make_set
from tdq_exp.fit.ptq.ptq import ptq
from tdq_exp.fit.qat import interval_tables, qat
from tdq_exp.models.weights.load import load_weights, save_weights
from tdq_exp.quant.convert import Recipe, bake, layer_map
from tdq_exp.quant.training import initialize
from tdq_exp.runtime import environment, figures, files, stage
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.tracking import Tracker


@dataclass(frozen=True)
class Data:
    """Training and held-out images."""

    train: Images
    held_out: Images

    def parts(self) -> dict[str, Any]:
        """For fingerprints: what the pixels are, never where they lie."""
        return {"train": self.train.content, "held_out": self.held_out.content, "protocol": self.train.protocol}


def samples_of(job: Job, images: Images, processes: Processes, mirror: bool = False) -> Samples:
    """A set of images as what the job's fit trains on; `mirror` if mirrored ones may be asked for."""
    return job.subject.samples(images, mirror=mirror and job.subject.flip, cache=cache_folder(job), processes=processes)


@dataclass(frozen=True)
class Fit:
    """A finished fit: the net to sample from (made when it is first wanted), its fingerprint, and what the row cites."""

    net: Callable[[], nn.Module]
    fingerprint: str
    facts: dict[str, Any]


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
    processes.decide(job.subject.parts)  # another download, or complaint
    parts = fit_parts(job, data, weights)
    file = job.folder / "fit.json"
    found = processes.decide(lambda: stage.check_same(file, parts, job.recorded()))
    mark = files.fingerprint(parts)
    if not (found and found["done"]):
        processes.decide(lambda: _export_is_free(job))  # now, and not after an hour
    if found is None:
        begun = {"name": job.name, "fingerprint": mark, "parts": parts, "config": job.recorded(), "done": False}
        processes.decide(lambda: files.write_json(file, begun))
    if found is not None and found["done"]:
        if job.fit.kind == "pretrain" and job.fit.export is not None:
            processes.decide(lambda: _export(job, found))
        loaded = net if job.fit.kind == "none" else None
        # Read when it is wanted: where the row is there already, as in a fresh clone, there need not be a net.
        return Fit(lambda: loaded or finished_net(job, processes.device), mark, found["facts"])
    log: Log | None = tracker.log if processes.main else None
    facts: dict[str, Any] = {"weights": weights, "seconds": 0.0, "validation_loss": None}
    if job.fit.kind == "pretrain":
        assert job.train is not None
        train, held_out = samples_of(job, data.train, processes, True), samples_of(job, data.held_out, processes)
        average, history = pretrain(
            job.subject, train, held_out, job.train, lr=job.fit.lr, seed=job.seed, folder=job.folder, mark=mark,
            processes=processes, log=log,
        )  # fmt: skip
        processes.decide(lambda: _keep(job, average, history, held_out))
        net, facts = average, facts | _history_facts(history)
    elif job.fit.kind != "none":
        assert net is not None and weights is not None
        fit = _trained if job.fit.kind == "qat" else _reconstructed
        net, found_facts = fit(job, data, net, weights, mark, processes, log)
        facts |= found_facts
        tables = interval_tables(net)
        if tables:  # dynamic ones have no step size before they see an input
            title = f"{job.name}: step sizes over time"
            processes.decide(lambda: figures.intervals_over_time(tables, job.folder / "intervals.png", title))
            tracker.intervals(tables)
            tracker.picture("intervals", job.folder / "intervals.png")
        baked = bake(net)
        processes.decide(lambda: save_weights(baked, job.folder / "baked.safetensors", {"fit": mark}))
        net = baked
        facts |= _first_layer_facts(job, baked, say=processes.main)
    if job.fit.kind != "none":
        facts |= {"processes": processes.world, "peak_memory_gb": environment.peak_memory_gb()}
    facts["environment"] = environment.environment()
    about = {"name": job.name, "fingerprint": mark, "parts": parts, "config": job.recorded()}
    made = {**about, "done": True, "facts": facts}
    processes.decide(lambda: files.write_json(file, made))
    if job.fit.kind == "pretrain" and job.fit.export is not None:
        processes.decide(lambda: _export(job, made))
    assert net is not None
    kept: nn.Module = net
    return Fit(lambda: kept, mark, facts)


def fit_parts(job: Job, data: Data, weights: str | None) -> dict[str, Any]:
    """What a fit depends on. A float model that is only loaded depends on its weights alone."""
    definition = job.part("model")["model"]["definition"]
    if job.fit.part != "network":  # of the rest of the model it knows nothing
        definition = definition[job.fit.part]
    parts: dict[str, Any] = {"weights": weights, "model": {"definition": definition}, **job.subject.parts()}
    if job.fit.kind == "none":
        return parts
    parts |= {"data": data.parts(), "seed": job.seed, **job.part("fit")}
    if job.calibration is not None:
        assert weights is not None
        parts["calibration"] = files.fingerprint(set_parts(job, data, weights))
    if job.recipe is not None:
        parts |= job.part("bits", "weight", "act", "tdq", "plan", "habits")
    return parts


def set_parts(job: Job, data: Data, weights: str) -> dict[str, Any]:
    """What a job's calibration set depends on."""
    assert job.calibration is not None
    model = job.part("model")["model"] | job.model.parts()
    return job.calibration.parts(model, weights, dataclasses.asdict(job.trajectory), data.train.content)


def _history_facts(history: History) -> dict[str, Any]:
    return {
        "seconds": round(history.seconds, 1), "validation_loss": history.validation[-1][1],
        "validation": history.validation, "best": [update for _, update in sorted(history.best)],
    }  # fmt: skip


def _first_layer_facts(job: Job, net: nn.Module, say: bool) -> dict[str, Any]:
    """How much of the starting noise the first layer does not see; said where it is enough to be seen in the images."""
    assert job.recipe is not None
    t = job.model.schedule.steps - 1  # where any sampler starts, or near it: a fit knows of none
    with torch.device("meta"):  # names are all that is wanted
        roles = job.model.roles(job.model.build())
    found = first_range(net, roles, t)
    if found is None:
        return {}
    share = noise_beyond(*found)
    if say and share > 1e-3:
        advice = "" if job.recipe.plan.edge_bits else "; plan=edge8 gives it 8 bits"
        console.print(
            f"note: {share:.1%} of the starting noise is beyond the range of the first layer's input"
            f" ({found[0]:.2f}..{found[1]:.2f} at t = {t}) and may come back as bright spots{advice}",
            markup=False,
        )
    return {"first_layer": {"t": t, "range": found, "noise_beyond": share}}


def _calibrated(
    job: Job, net: nn.Module, shown: Shown, parts: dict[str, Any], weights: str, processes: Processes
) -> nn.Module:
    assert job.recipe is not None
    key = {
        "version": 2,  # of the search for start values
        "weights": weights, **parts, "seed": job.seed,
        **job.part("model", "bits", "weight", "act", "tdq", "plan", "habits"), **job.model.parts(),
    }  # fmt: skip
    net = quantized_and_calibrated(
        net, job.model, job.recipe, shown, seed=job.seed, processes=processes, cache=cache_folder(job), key=key
    )
    processes.decide(lambda: _write_layer_map(job, net))
    return net


def _trained(
    job: Job, data: Data, net: nn.Module, weights: str, mark: str, processes: Processes, log: Log | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantization-aware training."""
    assert job.train is not None
    samples = job.fit.calibration_samples
    train, held_out = samples_of(job, data.train, processes, True), samples_of(job, data.held_out, processes)
    shown = drawn(job.model, train, samples, job.seed)
    net = _calibrated(job, net, shown, {"data": data.parts(), "samples": samples}, weights, processes)
    net, history = qat(
        net, job.model, train, held_out, job.train, job.rates, real_rounding=job.fit.real_rounding,
        seed=job.seed, folder=job.folder, mark=mark, processes=processes, log=log,
    )  # fmt: skip
    return net, _history_facts(history)


def _reconstructed(
    job: Job, data: Data, net: nn.Module, weights: str, mark: str, processes: Processes, log: Log | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Post-training quantization."""
    assert job.ptq is not None and job.calibration is not None
    parts = set_parts(job, data, weights)
    path = Path(job.calibration_path).expanduser() if job.calibration_path else None
    train = samples_of(job, data.train, processes) if job.calibration.kind == "forward" else None
    held_out = samples_of(job, data.held_out, processes)
    samples = make_set(
        job.calibration, net, job.model, job.trajectory, train, parts=parts, cache=cache_folder(job),
        processes=processes, path=path,
    )  # fmt: skip
    began = time.monotonic()
    float_net = copy.deepcopy(net)
    net = _calibrated(job, net, of_set(samples), {"set": files.fingerprint(parts)}, weights, processes)
    calibrated = time.monotonic() - began
    net, history = ptq(
        net, float_net, job.model, samples, job.ptq, seed=job.seed, folder=job.folder, mark=mark, processes=processes,
        log=log,
    )  # fmt: skip
    draws = fixed_draws(
        job.seed, Stream.VALIDATION, samples=job.fit.validation_samples, images=len(held_out),
        shape=job.model.sample_shape, steps=job.model.steps, random=held_out.random,
    )  # fmt: skip
    loss = validation_loss(net, job.model, held_out, draws, BATCH, processes)
    worse = [block["block"] for block in history.blocks if not block["kept"]]
    return net, {
        "seconds": round(calibrated + history.seconds, 1), "validation_loss": loss, "blocks": history.blocks,
        "blocks_not_kept": worse, "over_time": history.over_time, "best": [],
    }  # fmt: skip


def _write_layer_map(job: Job, net: nn.Module) -> None:
    rows = layer_map(net, job.model.roles(job.model.build()))
    quantized = sum(row["weight"] not in ("float", "-") for row in rows)
    leaves = sum(row["weight"] != "-" for row in rows)
    files.write_json(job.folder / "layers.json", {"quantized_leaves": quantized, "leaves": leaves, "layers": rows})


def _keep(job: Job, net: nn.Module, history: History, held_out: Samples) -> None:
    """Writes a pre-trained net, and a picture of what it does, if there is one."""
    about = {"validation_loss": repr(history.validation[-1][1]), "updates": str(history.validation[-1][0])}
    save_weights(net, job.folder / "weights.safetensors", about)
    rows = job.subject.shown(net, held_out)
    if rows:
        figures.sample_grid(rows, job.folder / "grid.png")


def _export_is_free(job: Job) -> None:
    if job.fit.export is not None and Path(job.fit.export).expanduser().exists():
        raise ValueError(f"fit.export={job.fit.export}: exists; remove it or choose another name")


def _export(job: Job, fit: dict[str, Any]) -> None:
    """Copies a pre-trained net to where `fit.export` says, its validation losses beside it."""
    path, target = job.folder / "weights.safetensors", Path(str(job.fit.export)).expanduser()
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise ValueError(f"fit.export={target}: exists and is another net; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    facts = fit["facts"]
    files.write_json(
        target.with_suffix(".history.json"),
        {
            "net": target.name, "name": fit["name"], "fingerprint": fit["fingerprint"], "seconds": facts["seconds"],
            **facts["environment"], "validation_loss": facts["validation"],
        },
    )  # fmt: skip


def finished_net(job: Job, device: torch.device, checkpoint: Path | None = None) -> nn.Module:
    """The baked net of a finished fit, or of one of its checkpoints.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, or is not of this fit.
    """
    if job.fit.kind == "pretrain":
        net = job.subject.build()
        load_weights(net, str(job.folder / "weights.safetensors"))
        return net.to(device).eval()
    assert job.recipe is not None
    net = skeleton(job, job.recipe)
    if checkpoint is not None:
        load_weights(net, str(checkpoint))
        return bake(net, inplace=True).to(device)
    net = bake(net, inplace=True)
    load_weights(net, str(job.folder / "baked.safetensors"))
    return net.to(device)


def skeleton(job: Job, recipe: Recipe) -> nn.Module:
    """The quantized network before calibration: the right modules, any numbers."""
    net = job.model.build()
    job.model.quantize(net, recipe)
    initialize(net)
    return net.eval()
