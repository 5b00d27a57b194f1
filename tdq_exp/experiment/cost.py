"""What a run would do, and what it would cost: printed by `plan_only=true`, and before anything large.

Times come from one measured forward pass on this machine, not from a table: a training step is taken as three forward
passes (five with quantizers), sampling as one per image and step.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdq_exp.experiment.build import Job
from tdq_exp.quant.convert import layer_map
from tdq_exp.runtime import files, launch
from tdq_exp.runtime.progress import console, print_table

PROBES = 4, 16, 64  # images in the measured forward pass: the next number if a pass took no longer than
SHORT = 0.1  # seconds


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes that a run still needs.

    `encode_seconds` is of one training image and its mirror, 0 where none is encoded. It is counted in no sum: how many
    there are is known when they have been read, and no run encodes them a second time.
    """

    fit_seconds: float
    sample_seconds: float
    disk_bytes: int
    parameters: int
    encode_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.fit_seconds + self.sample_seconds


@torch.no_grad()
def estimate(job: Job) -> Cost:
    """The cost of a job on this machine with the processes that it would have, stages that are done not counted."""
    device = launch.device(job.launcher)
    if job.launcher.threads:
        torch.set_num_threads(job.launcher.threads)
    subject = job.subject
    net = subject.build().to(device).eval()
    processes = launch.wanted(job.launcher)
    per_image = _forward_seconds(job, net, device) / processes
    encode, decode = (seconds / processes for seconds in _coding_seconds(job, device))
    fit_done, sample_done = stages_done(job)
    updates = 0 if fit_done or job.train is None else job.train.updates
    per_update = per_image * (5 if job.recipe is not None else 3) * job.fit.batch_size
    fit_seconds = updates * per_update
    if job.ptq is not None and job.calibration is not None and not fit_done:
        fit_seconds = per_image * _forward_passes(job, net)
    images = 0 if sample_done or job.fit.kind == "pretrain" else job.sampling.images
    if job.fit.report == "best_of_5":
        images *= 5
    parameters = sum(p.numel() for p in net.parameters())
    pixels = job.model.image_size**2 * job.model.channels
    disk = images * pixels + (0 if job.train is None or fit_done else parameters * 4 * (5 + job.train.keep_best))
    if job.calibration is not None and not fit_done:
        disk += job.calibration.samples * 4 * math.prod(job.model.sample_shape)
    sampling = images * (job.sampling.steps * per_image + decode)
    # A quantizer that only sees trajectories, or a net that is loaded, needs no training images.
    trains = job.train is not None and job.fit.part == "network"
    shown = job.calibration is not None and job.calibration.kind == "forward"
    return Cost(fit_seconds, sampling, disk, parameters, encode if (trains or shown) and not fit_done else 0.0)


def _forward_seconds(job: Job, net: nn.Module, device: torch.device) -> float:
    """Of one image, in as large a batch as is quick: a small network spends a small batch on its calls, not its sums."""
    subject = job.subject
    for batch in PROBES:
        x, eps = (torch.randn(batch, *s, device=device) for s in (subject.input_shape, subject.sample_shape))
        t = torch.zeros(batch, dtype=torch.long, device=device)
        seconds = _seconds(lambda: subject.training_loss(net, x, t, eps))  # noqa: B023
        if seconds > SHORT:
            break
    return seconds / batch


def _seconds(work: Callable[[], Tensor]) -> float:
    """Median of three, after one that is not counted."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        float(work().sum())  # a number: waits for an accelerator to finish
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[1]


def _coding_seconds(job: Job, device: torch.device) -> tuple[float, float]:
    """Of one image: to encode it with its mirror, and to decode it. Both 0 for a model of pixels."""
    codec = job.model.codec()
    if codec is None:
        return 0.0, 0.0
    codec.to(device).eval()
    image = torch.zeros(1, job.model.channels, job.model.image_size, job.model.image_size, device=device)
    x_0 = torch.zeros(1, *job.model.sample_shape, device=device)
    return 2 * _seconds(lambda: codec.encode(image)[0]), _seconds(lambda: codec.decode(x_0))


def _forward_passes(job: Job, net: nn.Module) -> float:
    """What post-training quantization takes, in forward passes of one image.

    The set, unless it is cached; the calibration; and for each of the blocks half a pass of either network over the set,
    and its updates at a share of a whole training step. Without reconstruction, TDQ's fit is about a pass over the set.
    """
    assert job.ptq is not None and job.calibration is not None
    samples, spec = job.calibration.samples, job.calibration
    runs = 0 if spec.kind == "forward" else spec.images * job.sampling.steps
    if not job.ptq.reconstruct:
        return runs + 2 * samples
    blocks = len({role.block for role in job.model.roles(net).values()})
    o = job.ptq.block
    updates = o.updates + (o.rounding_updates if o.rounding == "adaround" else 0)
    return runs + samples * (1 + blocks) + 5 * updates * o.batch_size


def stages_done(job: Job) -> tuple[bool, bool]:
    """Is there a finished fit, and a row, under this job's names? Their fingerprints are checked when it runs."""
    fit = files.read_json(job.folder / "fit.json")
    rows = files.read_json(job.folder / job.sample_name / "metrics.json")
    name = job.config["eval"]["label"]
    measured = rows is not None and any(row["config"]["eval"]["label"] == name for row in rows["rows"])
    return bool(fit and fit["done"]), measured


def show(job: Job) -> Cost:
    """Prints the stages of a job and what they would cost."""
    cost = estimate(job)
    fit_done, sample_done = stages_done(job)
    console.print(f"[bold]{job.name}[/bold] seed {job.seed} -> {job.folder / job.sample_name}")
    console.print(f"  model    {cost.parameters:,} parameters, weights {job.weights or 'to be trained'}")
    if job.recipe is not None:
        _show_layers(job)
    if cost.encode_seconds:
        size = 2 * 2 * 4 * math.prod(job.model.sample_shape)  # image and mirror, mean and deviation, float32
        console.print(
            f"  encode   training images, once for all runs: 1,000 take about {duration(1000 * cost.encode_seconds)}"
            f" and {1000 * size / 1e6:.0f} MB of the cache, mirrors included"
        )
    if job.ptq is not None and job.calibration is not None:
        said = "done" if fit_done else f"about {duration(cost.fit_seconds)}, making the set included"
        kind = f"{job.ptq.block.updates} updates a block" if job.ptq.reconstruct else "no reconstruction"
        console.print(
            f"  fit      {job.fit.kind}, {job.calibration.samples} {job.calibration.kind} samples, {kind}: {said}"
        )
    if job.train is not None:
        said = "done" if fit_done else f"about {duration(cost.fit_seconds)}"
        console.print(f"  fit      {job.fit.kind}, {job.train.updates} updates of {job.fit.batch_size}: {said}")
    if job.fit.kind != "pretrain":
        said = "done" if sample_done else f"about {duration(cost.sample_seconds)}"
        console.print(f"  sample   {job.sampling.images} images, {job.sampling.steps} steps: {said}")
        console.print(f"  measure  {', '.join(job.evaluation.metrics)} on {job.config['eval']['label']} features")
    console.print(f"  disk     {cost.disk_bytes / 1e9:.2f} GB")
    return cost


def _show_layers(job: Job) -> None:
    """What would be done to the layers, grouped: the run saves the whole map as `layers.json`."""
    assert job.recipe is not None
    net = job.model.build()
    roles = job.model.roles(net)
    job.model.quantize(net, job.recipe)
    rows = layer_map(net, roles)
    groups = Counter((r["role"], r["weight"], r["input"].split(":")[0]) for r in rows)
    leaves = [r for r in rows if r["weight"] != "-"]
    quantized = sum(r["weight"] != "float" for r in leaves)
    title = f"{quantized} of {len(leaves)} convolutions and linear layers quantized"
    print_table(title, ["role", "count", "weight", "input"], [(r, n, w, i) for (r, w, i), n in groups.items()])


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `7.5 h`, `12 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
