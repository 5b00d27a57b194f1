"""Speed and memory on one GPU, at the paper's scale -> gpu.json, as each result comes, and gpu.md.

    python scripts/bench/gpu.py [--seconds 330] [--out results/bench]
    python scripts/bench/gpu.py --only fit_loop savings     these parts alone
    python scripts/bench/gpu.py --rehearse        everything on a CPU, at a tiny size
    python scripts/bench/gpu.py --report          gpu.md anew, with the hours of both tables, from gpu.json

`ddim_cifar10` at batch 128 and `ldm_churches` at batch 32, W4A4, weights and images random, of which
no time depends. All in one process, each form warmed up, CUDA events, medians. A part that fails is
written down with its error, and the next one starts; parts that would begin after `--seconds` are
left out, and said to be.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_integer
import gpu_report
import torch
from steps import fit_options, training_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tdq_exp.config.compose import compose
from tdq_exp.diffusion.denoising_graph import RecordedSteps
from tdq_exp.diffusion.draws import draw_batch
from tdq_exp.experiment import build as jobs
from tdq_exp.fit import loop as loops
from tdq_exp.fit.ahead import batches_ahead
from tdq_exp.fit.ema import Ema
from tdq_exp.fit.gradients import Gradients
from tdq_exp.fit.qat import QatTraining, optimizer_groups, rates_of
from tdq_exp.fit.training_graph import TrainingGraph
from tdq_exp.fit.weight_update import WeightUpdate
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.recompute import recompute_activations
from tdq_exp.quant import Recipe, StaticIntervals, TemporalIntervals, bake, kernels, ops
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.runtime import environment, files
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes

PRECISIONS = ("float32", "tf32", "bfloat16")
RATE = 1e-6  # of all that is trained: nothing depends on it
FORMS = ("float", "LSQ", "LSQ+TDQ")
PARTS = (
    "ceilings", "one_quantizer", "denoising", "training", "fit_loop", "churches", "savings", "loop",
    "profiles", "layouts", "churches_images", "integers", "compiled",
)  # fmt: skip
Batch = tuple[Tensor, Tensor, Tensor]  # x_0, t, eps


class NoTimeLeft(Exception):
    """The bench is at its end; the message names the first part that is left out."""


class Bench:
    """Where results go, and how large everything is.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.small, self.out, self.deadline = (
            options.rehearse,
            options.out,
            time.monotonic() + options.seconds,
        )
        self.only: list[str] = options.only
        self.device = torch.device("cpu" if self.small else "cuda")
        self.rounds, self.warm_up = (2, 1) if self.small else (10, 3)
        self.precisions = PRECISIONS[:1] if self.small else PRECISIONS
        self.results: dict[str, Any] = {
            "about": {
                "device": "cpu" if self.small else torch.cuda.get_device_name(),
                "torch": torch.__version__, "kernels": kernels.used(self.device),
                "rehearsal": self.small, **environment.environment(),
            },
            "milliseconds": {}, "gigabytes": {}, "busy": {}, "profile": {}, "rates": {}, "integers": {},
            "loop": {}, "failed": {},
        }  # fmt: skip

    def wants(self, name: str) -> bool:
        """Return whether a part is asked for."""
        return not self.only or name in self.only

    def note(self, kind: str, name: str, value: Any) -> None:
        """Keep a result, and write all that there are."""
        self.results[kind][name] = value
        files.write_json(self.out / "gpu.json", self.results)
        print(f"{kind:13} {name:60} {value if not isinstance(value, list) else '...'}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Keep an error within the block from ending the bench.

        Raises:
            NoTimeLeft: if the block would begin after the last moment, and so would all others.
        """
        if time.monotonic() > self.deadline:
            raise NoTimeLeft(name)
        try:
            yield
        except Exception as error:
            if isinstance(error, NoTimeLeft):
                raise
            lines = str(error).strip().splitlines() or [""]
            self.note("failed", name, f"{type(error).__name__}: {lines[0]}"[:300])
            traceback.print_exc()
        finally:
            self._free()

    def _free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()

    def timed(self, name: str, step: Callable[[], object], rounds: int | None = None) -> float:
        """Median milliseconds of a step, back to back with its neighbours, and peak memory.

        Memory is of the step alone, if nothing else is held: build each in a function of its own.
        """
        self._free()
        for _ in range(self.warm_up):
            step()
        rounds = rounds or self.rounds
        if self.small:
            return self._timed_on_cpu(name, step, rounds)

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        self.note("gigabytes", name, round(torch.cuda.max_memory_reserved() / 1e9, 2))
        return self._keep(name, times)

    def _timed_on_cpu(self, name: str, step: Callable[[], object], rounds: int) -> float:
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return self._keep(name, times)

    def _keep(self, name: str, times: list[float]) -> float:
        median = round(statistics.median(times), 4)
        self.note(
            "milliseconds",
            name,
            {"median": median, "min": round(min(times), 4), "max": round(max(times), 4)},
        )
        return median

    def seen(self, name: str, step: Callable[[], object], steps: int = 4) -> None:
        """Share of the time in which the GPU computes, and the largest entries of the profile."""
        # Only what the GPU does: to note down what the host does would slow it.
        kinds = [ProfilerActivity.CPU if self.small else ProfilerActivity.CUDA]
        for _ in range(2):
            step()
        if not self.small:
            torch.cuda.synchronize()
        with profile(activities=kinds) as found:
            for _ in range(steps):
                step()
            if not self.small:
                torch.cuda.synchronize()

        events = [event for event in found.events() if _on_gpu(event)]
        spans = [(event.time_range.start, event.time_range.end) for event in events]
        if spans:
            self.note(
                "busy",
                name,
                round(_union(spans) / (max(e for _, e in spans) - min(b for b, _ in spans)), 3),
            )
            self.note("rates", f"launches in a step, {name}", len(spans) // steps)
        totals: dict[str, list[float]] = {}
        for event in events:
            total = totals.setdefault(event.name[:90], [0, 0.0])
            total[0] += 1
            total[1] += event.time_range.end - event.time_range.start
        table = sorted(totals.items(), key=lambda item: -item[1][1])
        self.note(
            "profile",
            name,
            [[n, int(c) // steps, round(us / steps / 1e3, 3)] for n, (c, us) in table[:16]],
        )


def _on_gpu(event: Any) -> bool:
    """Is it a kernel, copy or fill, and not a span that an annotation draws over several?"""
    if event.device_type != torch.autograd.DeviceType.CUDA or getattr(
        event, "is_user_annotation", False
    ):
        return False
    return not event.name.startswith(("Optimizer.", "ProfilerStep", "## "))


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    covered, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def autocast(device: torch.device, precision: str) -> Any:
    """Within the block, the network computes at that precision."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    half = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def built(model: DiffusionModel, form: str, device: torch.device) -> nn.Module:
    """A network with random weights, quantized if asked for, its ranges from one batch."""
    with torch.device(device):
        net = model.build()
    net.to(device)
    if form == "float":
        return net.train()
    encoding = model.network["block_out_channels"][0]
    intervals = TemporalIntervals(encoding=encoding) if form == "LSQ+TDQ" else StaticIntervals()
    model.quantize(net, Recipe(4, 4, Lsq, Lsq, intervals))
    net.to(device)

    quantizers = [module for module in net.modules() if isinstance(module, Quantizer)]
    for quantizer in quantizers:
        quantizer.observer = _starting(quantizer)
    with torch.no_grad():
        x = torch.randn(2, *model.sample_shape, device=device)
        model.predict(net.eval(), x, torch.zeros(2, dtype=torch.long, device=device))
    for quantizer in quantizers:
        quantizer.observer = None
    return net.train()


def _starting(quantizer: Quantizer) -> Callable[[Tensor], None]:
    def start(x: Tensor) -> None:
        s, z = ops.affine_range(*x.detach().aminmax(), quantizer.grid.n, quantizer.grid.p)
        quantizer.start(float(s), int(z))

    return start


class Training:
    """A training step as the fit's loop makes it: loss, gradients, AdamW with its groups, average.

    Args:
        bench: device and sizes.
        job: model, rates.
        form: one of `FORMS`.
        precision: one of `PRECISIONS`.
        batch: images.
        recorded: forward and backward pass as one CUDA graph, and the step as another?
        channels_last: layout of weights and images.
    """

    def __init__(
        self, bench: Bench, job: jobs.Experiment, form: str, precision: str, batch: int,
        recorded: bool = False, channels_last: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.model, self.precision = bench.device, job.model, precision
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = built(job.model, form, bench.device).to(memory_format=self.layout)
        fit: Any = job.fit
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.net, rates_of(fit.options)), fused=True
        )
        self.weight_update = WeightUpdate(
            self.net, self.optimizer, Ema(self.net, 0.9999), 0.0, self.device
        )
        self.batches = [self.random_batch(batch, seed) for seed in range(3)]
        self.graph = TrainingGraph(self.net, self.backward, self.batches[0]) if recorded else None
        self.update = 0

    def random_batch(self, batch: int, seed: int) -> Batch:
        """A batch on the device."""
        torch.manual_seed(seed)
        shape = (batch, *self.model.sample_shape)
        x_0 = torch.rand(shape, device=self.device) * 2 - 1
        t = torch.randint(self.model.schedule.steps, (batch,), device=self.device)
        return x_0.contiguous(memory_format=self.layout), t, torch.randn(shape, device=self.device)

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss at this precision."""
        with autocast(self.device, self.precision):
            return self.model.training_loss(self.net, x_0, t, eps)

    def backward(self, *batch: Tensor) -> Tensor:
        """Add the loss's gradients to the parameters; return the loss."""
        loss = self.loss(*batch)
        loss.backward()
        return loss.detach()

    def __call__(self, batch: Batch | None = None, wait: bool = False) -> None:
        """One update, on a batch that is there unless one is given; `wait` reads the loss on the host."""
        self.update += 1
        batch = batch or self.batches[self.update % len(self.batches)]
        if self.graph is not None:
            loss = self.graph(*batch)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(*batch)
        if wait:
            float(loss.detach())
        if self.graph is None:
            loss.backward()
        self.weight_update(self.update, 1.0, fixed=self.graph is not None)


def ceilings(bench: Bench) -> None:
    """What the card can do: bytes copied and products, each once."""
    size = 256 if bench.small else 8192
    a = torch.randn(size, size, device=bench.device)
    ms = bench.timed("copy", lambda: a.clone())
    bench.note("rates", "copy, TB/s (read and written)", round(2 * a.numel() * 4 / ms / 1e9, 2))
    for precision in bench.precisions:
        with autocast(bench.device, precision):
            ms = bench.timed(f"product {precision}", lambda: a @ a)
        bench.note("rates", f"product {precision}, TFLOP/s", round(2 * size**3 / ms / 1e9, 1))


def one_quantizer(bench: Bench) -> None:
    """A quantizer by itself on the largest activation of the CIFAR-10 network."""
    shape = (4, 8, 8, 8) if bench.small else (128, 256, 32, 32)
    x = torch.randn(shape, device=bench.device, requires_grad=True)
    s = torch.full((shape[0], 1, 1, 1), 0.3, device=bench.device, requires_grad=True)
    z = torch.tensor(5.0, device=bench.device, requires_grad=True)
    g = torch.randn(shape, device=bench.device)

    for name, step, layout in (
        ("static", s[0].detach().reshape(()).requires_grad_(), "one s"),
        ("TDQ", s, "s per sample"),
    ):  # noqa: E501

        def forward(step: Tensor = step) -> Tensor:
            return ops.fake_quantize(x.detach(), step.detach(), z.detach(), 0, 15)

        def both(step: Tensor = step) -> object:
            x_hat = ops.fake_quantize_learned(x, step, z, 0, 15)
            return torch.autograd.grad(x_hat, [x, step, z], g)

        for kind, context in (("fused", nullcontext), ("unfused", kernels.unfused)):
            with context():
                ms = bench.timed(f"quantizer {name} forward, {kind}", forward)
                bench.timed(f"quantizer {name} forward and backward, {kind}", both)
            if kind == "fused":
                rate = round(2 * x.numel() * 4 / ms / 1e9, 2)
                bench.note("rates", f"quantizer {name} ({layout}) forward, TB/s", rate)


def denoising(
    bench: Bench, job: jobs.Experiment, model: str, batch: int, precisions: tuple[str, ...]
) -> None:
    """A denoising step of each baked network inside of a CUDA graph, and by the eager loop."""
    for form in FORMS:
        with bench.part(f"denoise {model} {form}"):
            net = built(job.model, form, bench.device)
            net = (net if form == "float" else bake(net, inplace=True)).eval().requires_grad_(False)
            x = torch.randn(batch, *job.model.sample_shape, device=bench.device)
            for precision in precisions:
                _denoise(bench, job, f"denoise {model} {form} {precision}", net, x, precision)
            del net


def _denoise(
    bench: Bench, job: jobs.Experiment, name: str, net: nn.Module, x: Tensor, precision: str
) -> None:
    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        with autocast(bench.device, precision):
            return job.model.predict(net, x_t, t)

    def recorded() -> None:
        steps = RecordedSteps(job.sampler, predict, x, job.model.schedule)
        steps.record()
        steps.i.zero_()
        bench.timed(f"{name}, graph", steps.step)

    with torch.no_grad(), bench.part(name):
        recorded()
        if " ldm " in name:
            return  # large enough to hide its launches
        t = torch.tensor(500, device=bench.device)
        bench.timed(f"{name}, eager", lambda: predict(x, t))


def training(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """Every form of a training step at one precision."""
    for form in FORMS:
        for recorded in (False, True):
            name = f"train {form} {precision}" + (", graph" if recorded else "")
            with bench.part(name):
                _train(bench, name, Training(bench, job, form, precision, batch, recorded))

    # Without kernels inside of a graph too: what launches cost is no part of this comparison.
    for form in FORMS[1:]:
        name = f"train {form} {precision}, graph, unfused"
        with bench.part(name), kernels.unfused():
            bench.timed(name, Training(bench, job, form, precision, batch, recorded=True))


def _train(bench: Bench, name: str, step: Training) -> None:
    bench.timed(name, step)
    if step.graph is None and " float " not in name:
        with kernels.unfused():
            bench.timed(f"{name}, unfused", step)


def profiles(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """What the GPU does in a training step, and for which share of the time."""
    for form, recorded in (("LSQ+TDQ", False), ("LSQ+TDQ", True), ("float", False)):
        name = f"train {form} {precision}" + (", graph" if recorded else "")
        with bench.part(f"profile of {name}"):
            bench.seen(name, Training(bench, job, form, precision, batch, recorded))


def layouts(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """Channels-last, recorded."""
    for form in FORMS:
        name = f"train {form} {precision}, graph, channels-last"
        with bench.part(name):
            bench.timed(name, Training(bench, job, form, precision, batch, True, True))


def loop(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """Updates with the loop's draws from the host: waiting at each, and prepared ahead."""
    images = torch.rand(2000, *job.model.sample_shape) * 2 - 1

    def make(update: int) -> tuple[Tensor, ...]:
        draws = draw_batch(
            0, update, batch_size=batch, images=len(images), shape=job.model.sample_shape,
            steps=job.model.schedule.steps, flip=True,
        )  # fmt: skip
        x_0 = images[draws.index]
        return torch.where(draws.flip[:, None, None, None], x_0.flip(3), x_0), draws.t, draws.eps

    for recorded in (False, True):
        name = f"loop LSQ+TDQ {precision}" + (", graph" if recorded else "")
        with bench.part(name):
            _loop(bench, name, Training(bench, job, "LSQ+TDQ", precision, batch, recorded), make)


def _loop(bench: Bench, name: str, step: Training, make: Callable[[int], Any]) -> None:
    def waiting() -> None:
        x_0, t, eps = (v.to(bench.device) for v in make(step.update))
        step((x_0, t, eps), wait=True)

    if step.graph is None:
        bench.timed(f"{name}, draws on the host, loss read at each update", waiting)
    ahead: Any = batches_ahead(make, 0, 10**6, bench.device)
    with closing(ahead) as batches:
        bench.timed(f"{name}, draws ahead, nothing read", lambda: step(next(batches)))


def churches(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """The latent model's training: memory and time."""
    for form in ("LSQ+TDQ", "float", "LSQ"):
        name = f"train ldm {form} {precision}"
        with bench.part(name):
            bench.timed(
                name, Training(bench, job, form, precision, batch), rounds=min(bench.rounds, 5)
            )


def savings(bench: Bench, job: jobs.Experiment, precision: str, batch: int) -> None:
    """What micro-batches and recomputed activations save, and cost, in the latent model's training."""
    for title, recompute, micro in (
        ("4 micro-batches", False, 4),
        ("activations computed again", True, 1),
    ):
        name = f"train ldm LSQ+TDQ {precision}, graph, {title}"
        with bench.part(name):
            _saving(bench, job, name, precision, batch, recompute, micro)


def _saving(
    bench: Bench, job: jobs.Experiment, name: str, precision: str, batch: int, recompute: bool,
    micro: int,
) -> None:  # fmt: skip
    # With its optimizer and its average, whose tensors a card has to hold, too.
    training = Training(bench, job, "LSQ+TDQ", precision, batch)
    if recompute:
        recompute_activations(training.net)
    gradients = Gradients(training.net, training.loss, Processes(cpu=bench.small), micro)

    def update() -> None:
        gradients(training.batches[0])
        training.update += 1
        training.weight_update(training.update, 1.0, fixed=gradients.recorded)

    bench.timed(name, update, rounds=3)


class Sections:
    """Times of the loop's parts: on the host, and on the GPU between two events.

    Args:
        bench: device.
    """

    def __init__(self, bench: Bench) -> None:
        self.on_gpu = not bench.small
        self.notes: dict[str, list[tuple[float, Any, Any]]] = {}  # seconds of the host, and events

    def _event(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable[..., Any], gpu: bool = True) -> Any:
        """Return the function, timed; `gpu=False` for what another thread does."""

        def call(*args: Any, **options: Any) -> Any:
            began, first = time.perf_counter(), self._event() if gpu else None
            result = function(*args, **options)
            last = self._event() if gpu else None
            self.notes.setdefault(name, []).append((time.perf_counter() - began, first, last))
            return result

        return call

    def host(self, name: str, skip: int) -> float:
        """Return the mean milliseconds of the host, the first calls left out."""
        return 1e3 * statistics.fmean(note[0] for note in self.notes[name][skip:])

    def device(self, name: str, skip: int) -> float:
        """Return the mean milliseconds between the events, the first calls left out."""
        spans = [(first, last) for _, first, last in self.notes[name][skip:]]
        if self.on_gpu:
            return statistics.fmean(first.elapsed_time(last) for first, last in spans)
        return 1e3 * statistics.fmean(last - first for first, last in spans)


class TimedPart:
    """A callable part of the loop, timed; all else is asked of the part itself."""

    def __init__(self, part: Any, call: Callable[..., Any]) -> None:
        self._part, self._call = part, call

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the part."""
        return self._call(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def fit_loop(
    bench: Bench, job: jobs.Experiment, precision: str, batch: int, compiled: bool = False
) -> None:
    """Updates of the loop that a fit runs, and how much of each lies outside of recordings."""
    for form in FORMS:
        name = f"fit's loop {form} {precision}" + (", compiled" if compiled else "")
        with bench.part(name), tempfile.TemporaryDirectory() as folder:
            net = built(job.model, form, bench.device)
            options = fit_options(12 if bench.small else 60, batch, RATE, precision)
            place, processes = Path(folder), Processes(cpu=bench.small)
            context = RunContext(place, "", 0, processes, place, compile=compiled)
            _time_loop(bench, name, training_of(job.model, net, options, context))
            del net


def _time_loop(bench: Bench, name: str, training: QatTraining) -> None:
    """Run a training, and note what its updates take, in all and by section."""
    sections = Sections(bench)
    stamps: list[float] = []  # what lies between two readings is all that the host can know
    recorded: list[bool] = []  # at each reading, for a training frees its recordings at its end
    read = sections.timed("read", training._read)

    def noted(done: int) -> Any:
        recorded.append(training.gradients.recorded and training.weight_update.recorded)
        answer = read(done)
        stamps.append(time.perf_counter())
        return answer

    def ahead(*arguments: Any) -> Iterator[Any]:
        batches = batches_ahead(*arguments)
        following = sections.timed("wait for a batch", lambda: next(batches, None), gpu=False)
        try:
            while (batch := following()) is not None:
                yield batch
        finally:
            batches.close()

    # The parts of an update: names as in `loops.Training._update`.
    loop: Any = training
    loop._read = noted
    loop._batch = sections.timed("make a batch", training._batch, gpu=False)
    loop.gradients = TimedPart(training.gradients, sections.timed("gradients", training.gradients))
    loop.weight_update = TimedPart(
        training.weight_update, sections.timed("step", training.weight_update)
    )
    loop._update = sections.timed("update", training._update)

    began = time.perf_counter()
    with mock.patch.object(loops, "batches_ahead", ahead):
        training.run()

    # The median between readings; the first of them holds the recording.
    every = training.read_every
    times = [1e3 * (b - a) / every for a, b in pairwise(stamps)]
    median = bench._keep(name, times)
    in_gradients, in_step = (sections.device(part, every) for part in ("gradients", "step"))
    found = {
        "recorded": recorded[-1],
        "an update": median,
        "on the device, gradients": in_gradients,
        "on the device, step and average": in_step,
        "outside of both": statistics.fmean(times) - in_gradients - in_step,  # means, all three
        "host, gradients": sections.host("gradients", every),
        "host, step and average": sections.host("step", every),
        "host, whole update": sections.host("update", every),
        "host, waiting for a batch": sections.host("wait for a batch", every),
        "host, reading the losses, once in each interval": sections.host("read", 1),
        "another thread, making a batch": sections.host("make a batch", every),
        "once, until the first reading": 1e3 * (stamps[0] - began),
    }
    bench.note(
        "loop", name, {k: v if v is True or v is False else round(v, 3) for k, v in found.items()}
    )


def churches_images(bench: Bench, job: jobs.Experiment, precisions: tuple[str, ...]) -> None:
    """The latent model's denoising step, and the decoding of images."""
    denoising(bench, job, "ldm", 2 if bench.small else 100, precisions)
    with bench.part("decode"), torch.no_grad():
        assert job.model.codec is not None
        codec = job.model.codec.build()
        codec.to(bench.device).eval()
        latent = torch.randn(2 if bench.small else 8, *job.model.sample_shape, device=bench.device)
        bench.timed("decode ldm", lambda: codec.decode(latent))


def run(options: argparse.Namespace) -> None:
    """All parts that there is time for, then the page."""
    # What can't be recorded is no result, but an error that shows where.
    warnings.filterwarnings("error", message="training launches|sampling step by step")
    gc.freeze()  # garbage is collected before each measurement: not among all that was imported
    bench = Bench(options)
    try:
        parts(bench)
    except NoTimeLeft as part:
        bench.note("about", "left_out", f"no time was left for: {part}, and what comes after it")
    gpu_report.write(options.out, hours=False)


def about_integers(bench: Bench, job: jobs.Experiment, batch: int) -> None:
    """What is about integers: the baked network of TDQ, its layers on codes or simulated."""
    with bench.part("integers"):
        net = bake(built(job.model, "LSQ+TDQ", bench.device), inplace=True)
        gpu_integer.integers(bench, job, net.eval().requires_grad_(False), batch)


def parts(bench: Bench) -> None:
    """All parts that are asked for, the bars first."""
    sizes = {"ddim": 4 if bench.small else 128, "ldm": 2 if bench.small else 32}
    bench.note("about", "batch", sizes)
    pixel = _job("ddim_w4a4_lsq_tdq", "tiny" if bench.small else None)
    latent = _job("ldm_w4a4_lsq_tdq", "tiny_latent" if bench.small else None)
    fast = bench.precisions[-1]

    # Of one network at one precision.
    forms: dict[str, Callable[[str], None]] = {
        "training": lambda p: training(bench, pixel, p, sizes["ddim"]),
        "churches": lambda p: churches(bench, latent, p, sizes["ldm"]),
        "savings": lambda p: savings(bench, latent, p, sizes["ldm"]),
        "compiled": lambda p: fit_loop(bench, pixel, p, sizes["ddim"], compiled=True),
        "fit_loop": lambda p: fit_loop(bench, pixel, p, sizes["ddim"]),
        "loop": lambda p: loop(bench, pixel, p, sizes["ddim"]),
        "profiles": lambda p: profiles(bench, pixel, p, sizes["ddim"]),
        "layouts": lambda p: layouts(bench, pixel, p, sizes["ddim"]),
    }

    def one(name: str, *precisions: str) -> None:
        if bench.wants(name):
            for precision in precisions:
                forms[name](precision)

    if bench.wants("ceilings"):
        with bench.part("ceilings"):
            ceilings(bench)
    if bench.wants("one_quantizer"):
        with bench.part("one quantizer"):
            one_quantizer(bench)
    if bench.wants("denoising"):
        denoising(bench, pixel, "ddim", sizes["ddim"], bench.precisions)

    # The loop beside the step that it makes.
    one("training", fast)
    one("fit_loop", "bfloat16")
    one("training", *reversed(bench.precisions[:-1]))
    if bench.wants("integers"):
        about_integers(bench, pixel, sizes["ddim"])
    one("churches", fast)
    one("savings", fast)
    one("fit_loop", *(() if bench.small else ("tf32",)))
    for name in ("loop", "profiles", "layouts"):
        one(name, fast)
    if "compiled" in bench.only:  # takes minutes
        one("compiled", "bfloat16")
    if bench.wants("churches_images"):
        churches_images(bench, latent, (fast,))

    # If time is left: the same at the other precisions.
    for precision in bench.precisions[:-1]:
        for name in ("churches", "loop", "profiles", "layouts"):
            one(name, precision)


def _job(experiment: str, model: str | None) -> jobs.Experiment:
    words = [f"+experiment={experiment}", "model.weights=random", "tracker=none"]
    return jobs.build(
        compose([*words, *([] if model is None else [f"model={model}"])]), source=False
    )


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=330, help="start no part after so long (default: 330)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench"), help="folder of gpu.json and gpu.md"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run every part on a CPU, at a tiny size"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=PARTS,
        help="these parts alone (default: all but compiled)",
    )
    parser.add_argument(
        "--report", action="store_true", help="write gpu.md anew from gpu.json, with the hours"
    )
    options = parser.parse_args()
    if options.report:
        gpu_report.write(options.out, hours=True)
    else:
        run(options)


if __name__ == "__main__":
    main()
