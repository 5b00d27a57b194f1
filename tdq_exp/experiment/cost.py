"""What a run would do and cost: printed by `plan_only=true`, and before anything large.

Times come from one measured forward pass of each network on this machine, not from a table; a fit
says how many forward passes it takes, and sampling takes one per image and step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.diffusion.draws import Stream
from tdq_exp.experiment import card
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.card import CardCost
from tdq_exp.experiment.row import read_rows
from tdq_exp.experiment.stored_network import network_is_here
from tdq_exp.quant.convert import Recipe, layer_map
from tdq_exp.runtime import files, launch
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.progress import console, print_table

PROBES = 4, 16, 64  # images in the measured pass: the next number if one took no longer than
SHORT = 0.1  # seconds

# Seconds of one image in a pass, measured in this process: the cells of a table share networks.
_FORWARD: dict[str, float] = {}
_CODING: dict[str, tuple[float, float]] = {}


@dataclass(frozen=True)
class Cost:
    """What a run still needs.

    Args:
        fit_seconds, sample_seconds: of the stages that are not done.
        disk_bytes: of what is written.
        parameters: of the network.
        encode_seconds: of one training image and its mirror, 0 where none is encoded. It is counted
            in no sum: how many there are is known when they have been read, and no run encodes them
            a second time.
        fit_text: what the fit does, for a reader; empty if nothing.
        card: the same on a GPU that was measured, whatever this machine has.
        fit_disk_bytes: of `disk_bytes`, what the fit writes.
    """

    fit_seconds: float
    sample_seconds: float
    disk_bytes: int
    parameters: int
    encode_seconds: float = 0.0
    fit_text: str = ""
    card: CardCost | None = None
    fit_disk_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Return the time of fit and sampling together."""
        return self.fit_seconds + self.sample_seconds

    def without_fit(self) -> Cost:
        """Return the cost of another set of images of the same fit."""
        return dataclasses.replace(
            self,
            fit_seconds=0.0,
            disk_bytes=self.disk_bytes - self.fit_disk_bytes,
            fit_disk_bytes=0,
            card=self.card and dataclasses.replace(self.card, fit_seconds=0.0),
        )


@torch.no_grad()
def estimate(job: Experiment) -> Cost:
    """Return the cost of a run on this machine, stages that are done not counted."""
    launcher, options = job.machine.launcher, job.fit.options
    device = launch.device(launcher)
    if launcher.threads:
        torch.set_num_threads(launcher.threads)

    # 1. One image through the network, its encoding and its decoding, shared by the processes.
    with torch.device("meta"):  # shapes are all that is counted
        net = job.trained.build()
    parameters = sum(p.numel() for p in net.parameters())
    processes = launch.wanted(launcher)
    per_image = _forward_seconds(job, device) / processes
    encode, decode = (seconds / processes for seconds in _coding_seconds(job, device))

    # 2. The fit.
    fit_done, sample_done = stages_done(job)
    work = job.fit.work(job.model, net, job.sampling.steps)
    passes, fit_disk = (
        (0.0, 0) if work is None or fit_done else (work.forward_passes, work.disk_bytes)
    )

    # 3. The images, of every checkpoint that is a candidate.
    images = 0 if sample_done or not options.gives_rows else job.sampling.images
    images *= options.checkpoints if options.chooses_checkpoint else 1
    sampling = images * (job.sampling.steps * per_image + decode)
    disk = fit_disk + images * job.model.image_size**2 * job.model.channels

    # A quantizer that sees only trajectories, or a net that is loaded, needs no training images.
    encodes = job.fit.encodes_training_images and not fit_done
    return Cost(
        fit_seconds=passes * per_image,
        sample_seconds=sampling,
        disk_bytes=disk,
        parameters=parameters,
        encode_seconds=encode if encodes else 0.0,
        fit_text=work.text if work else "",
        card=card.estimate(job, passes, images),
        fit_disk_bytes=fit_disk,
    )


def network_key(job: Experiment) -> str:
    """Return what the time of a forward pass depends on: the float network, and the machine.

    Neither bits nor rule nor step sizes: what a fit and a set take is counted in passes of the
    float network.
    """
    about = [job.part("model"), job.fit.options.part, str(launch.device(job.machine.launcher))]
    return json.dumps([*about, torch.get_num_threads()], sort_keys=True)


def _forward_seconds(job: Experiment, device: torch.device) -> float:
    """Return the seconds of one image through the float network, measured once for each network."""
    key = network_key(job)
    if key not in _FORWARD:
        _FORWARD[key] = _measured_seconds(job, job.trained.build().to(device).eval(), device)
    return _FORWARD[key]


def _measured_seconds(job: Experiment, net: nn.Module, device: torch.device) -> float:
    """Return the seconds of one image, in as large a batch as is quick.

    A small network spends a small batch on its calls, not its sums.
    """
    trained = job.trained

    for batch in PROBES:
        shapes = trained.input_shape, trained.sample_shape
        x, eps = (torch.randn(batch, *shape, device=device) for shape in shapes)
        t = torch.zeros(batch, dtype=torch.long, device=device)
        condition = trained.draw_condition(0, Stream.IMAGE, range(batch))
        if condition is not None:
            condition = condition.to(device)

        seconds = _seconds(
            lambda: trained.training_loss(net, x, t, eps, condition)  # noqa: B023
        )
        if seconds > SHORT:
            break

    return seconds / batch


def _seconds(work: Callable[[], Tensor]) -> float:
    """Return the median of three, after one that is not counted.

    In float32, as images are sampled: torch would take TF32 on a GPU, several times as fast.
    """
    seconds = []
    with products("float32"):
        for _ in range(4):
            began = time.perf_counter()
            float(work().sum())  # a number: waits for an accelerator to finish
            seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[1]


def _coding_seconds(job: Experiment, device: torch.device) -> tuple[float, float]:
    """Return the seconds to encode an image with its mirror, and to decode one; 0 for pixels.

    Measured once for each network, as `_forward_seconds`.
    """
    key = network_key(job)
    if key not in _CODING:
        _CODING[key] = _measured_coding(job, device)
    return _CODING[key]


def _measured_coding(job: Experiment, device: torch.device) -> tuple[float, float]:
    codec = job.model.codec.build() if job.model.codec else None
    if codec is None:
        return 0.0, 0.0
    codec.to(device).eval()
    image = torch.zeros(
        1, job.model.channels, job.model.image_size, job.model.image_size, device=device
    )
    x_0 = torch.zeros(1, *job.model.sample_shape, device=device)
    return 2 * _seconds(lambda: codec.encode(image)[0]), _seconds(lambda: codec.decode(x_0))


def stages_done(job: Experiment) -> tuple[bool, bool]:
    """Return whether there is nothing left to fit, and whether there is a row.

    Fingerprints are checked when it runs. A finished fit whose network is gone is made again where
    something new is wanted of it.
    """
    fit = files.read_json(job.folder / FIT_RECORD, needs=["done"])
    rows_file = job.folder / job.sample_name / "metrics.json"
    rows = read_rows(rows_file) if fit is not None else []  # they refer to its record

    name = job.evaluation.label
    measured = any(row["config"]["eval"]["label"] == name for row in rows)
    here = measured or job.fit.options.loads_only or network_is_here(job)
    return bool(fit and fit["done"] and here), measured


def show(job: Experiment) -> Cost:
    """Print the stages of a run and what they would cost."""
    cost = estimate(job)
    fit_done, sample_done = stages_done(job)
    weights = job.weights.path or "to be trained"

    # The experiment and its network.
    place = job.folder / job.sample_name
    console.print(f"{job.name} seed {job.seed} -> {place}", style="bold")
    console.print(f"  model    {cost.parameters:,} parameters, weights {weights}")
    if job.recipe is not None:
        _show_layers(job, job.recipe)

    # The stages, each with what it would take.
    if cost.encode_seconds:
        size = 2 * 2 * 4 * math.prod(job.model.sample_shape)  # mean and deviation, and mirrored
        console.print(
            "  encode   training images, once for all runs: 1,000 take about"
            f" {duration(1000 * cost.encode_seconds)} and {1000 * size / 1e6:.0f} MB of the cache,"
            " mirrors included"
        )

    if cost.fit_text:
        state = "done" if fit_done else f"about {duration(cost.fit_seconds)}"
        console.print(f"  fit      {cost.fit_text}: {state}")

    if job.fit.options.gives_rows:
        state = "done" if sample_done else f"about {duration(cost.sample_seconds)}"
        console.print(
            f"  sample   {job.sampling.images} images, {job.sampling.steps} steps: {state}"
        )
        metrics = ", ".join(job.evaluation.metrics)
        console.print(
            f"  measure  {metrics} on {job.evaluation.label} features{_features_to_fetch(job)}"
        )

    console.print(f"  disk     {cost.disk_bytes / 1e9:.2f} GB")
    if cost.card is not None and cost.card.seconds:
        console.print(f"  on a GPU {on_card(cost.card)}")
    for line in job.notes:
        console.print(f"note: {line}")
    return cost


def _features_to_fetch(job: Experiment) -> str:
    """Return a remark if the feature network's weights are on no disk here yet."""
    file = job.features_to_fetch()
    if file is None or file.is_file():
        return ""
    return ": their weights are not here and are fetched first (or eval.features.weights=PATH)"


def _show_layers(job: Experiment, recipe: Recipe) -> None:
    """Print what would be done to the layers, grouped; `layers.json` has the whole map."""
    net = job.model.build()
    roles = job.model.roles(net)
    job.model.quantize(net, recipe)

    rows = layer_map(net, roles)
    groups = Counter((r["role"], r["weight"], r["input"].split(":")[0]) for r in rows)
    leaves = [r for r in rows if r["weight"] != "-"]
    quantized = sum(r["weight"] != "float" for r in leaves)

    title = f"{quantized} of {len(leaves)} convolutions and linear layers quantized"
    lines = [(role, count, w, i) for (role, w, i), count in groups.items()]
    print_table(title, ["role", "count", "weight", "input"], lines)


def on_card(there: CardCost) -> str:
    """Return what a run would take on a card, for a reader."""
    fit, sample = duration(there.fit_seconds), duration(there.sample_seconds)
    stages = (("training", there.memory_gb), ("sampling", there.sample_gb))
    known = [f"{gigabytes:.0f} GB {stage}" for stage, gigabytes in stages if gigabytes]
    memory = f", of its memory at most {' and '.join(known)}" if known else ""
    basis = "" if there.measured else "; at least, from counted multiplications"
    basis += "; at most, as its training was measured without CUDA graphs" if there.singly else ""
    return f"{there.card}: fit {fit} in {there.precision}, images {sample}{memory}{basis}"


def duration(seconds: float) -> str:
    """Return `50 s`, `12 min`, `7.5 h`, `12 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
