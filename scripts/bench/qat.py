"""Measure the speed of a training step and of a denoising step on `ddim_small` -> results/bench/qat.md.

    python scripts/bench/qat.py [--threads 2] [--rounds 15] [--batch 64]

Numbers are medians of interleaved runs in one process. Beside our quantizers: the same without our
fused kernels, with torch's own fused learnable fake-quantize (per channel, the batch as the channel
axis, where every sample has a step size of its own), and with TDQ's generators evaluated one by
one.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from steps import (
    WARM_UP,
    denoising_step,
    fit_options,
    medians,
    quantized,
    training_of,
    training_step,
    without_kernels,
)
from torch import Tensor, nn

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import GeneratorBank, Temporal, TemporalIntervals, encode_time
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.time import TimeContext
from tdq_exp.report import pages
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes

AIMS = {
    "LSQ / float, training step": ("train LSQ", "train float", 1.4),
    "LSQ+TDQ / LSQ, training step": ("train LSQ+TDQ", "train LSQ", 1.1),
    "baked W4A4 LSQ+TDQ / float, denoising step": ("denoise LSQ+TDQ baked", "denoise float", 1.2),
}


class TorchFused(Lsq):
    """LSQ by torch's fused learnable fake-quantize kernels."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """Return x_hat with torch's gradients of x, s and z."""
        z = self.zero if z is None else z
        n, p, scale = self.grid.n, self.grid.p, 1.0
        if s.numel() == 1 and z.numel() == 1:
            fused = torch._fake_quantize_learnable_per_tensor_affine
            return fused(x, s.reshape(1), z.reshape(1), n, p, scale)
        steps, zeros = s.reshape(-1), z.reshape(-1).expand(len(x)).contiguous()
        return torch._fake_quantize_learnable_per_channel_affine(
            x.contiguous(), steps, zeros, 0, n, p, scale
        )


class OneByOne(Interval):
    """A generator of its own for one quantizer, evaluated when it is asked."""

    time: TimeContext
    time_dependent = True

    def __init__(self, bank: GeneratorBank, row: int) -> None:
        super().__init__()
        self.time, self.encoding = bank.time, bank.encoding
        layers: list[nn.Module] = []
        for weight, bias in zip(bank.weights, bank.biases, strict=True):
            linear = nn.Linear(weight.shape[2], weight.shape[1])
            with torch.no_grad():
                linear.weight.copy_(weight[row])
                linear.bias.copy_(bias[row])
            layers += [linear, nn.ReLU()]
        self.generate = nn.Sequential(*layers[:-1], nn.Softplus())

    def step_size(self) -> Tensor:
        """`[B]`."""
        return self.generate(encode_time(self.time.t.reshape(-1), self.encoding)).squeeze(-1)


def one_by_one(net: nn.Module) -> nn.Module:
    """Return the same network with every generator by itself."""
    net = copy.deepcopy(net)
    for quantizer in activation_quantizers(net).values():
        interval = quantizer.interval
        assert isinstance(interval, Temporal)
        quantizer.interval = OneByOne(interval.bank, interval.row)
    del net.generators
    return net


def main() -> None:
    """Measure, write the page and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default: 15)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: 64)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench"), help="folder of qat.md and qat.json"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if isinstance(kernels.library(), str):
        raise SystemExit(f"there are no fused kernels here: {kernels.library()}")

    times = measure(options.batch, options.rounds)
    loop = loop_of_a_fit(options.batch, 4 * options.rounds)
    about = pages.about(threads=options.threads, rounds=options.rounds, batch=options.batch)
    found = {"milliseconds": times, "loop": loop}
    pages.report(options.out / "qat", found, about, page(times, loop, about))


def loop_of_a_fit(batch: int, updates: int) -> dict[str, float]:
    """Return the medians of an update of a fit and of the making of its batch, milliseconds.

    On a CPU the loop waits while a batch is made; on a GPU another thread makes it meanwhile.
    """
    model = jobs.make(compose(["model=ddim_small"]), "model.definition")
    torch.manual_seed(0)
    x, t = torch.randn(batch, *model.sample_shape), torch.randint(model.schedule.steps, (batch,))
    temporal = TemporalIntervals(encoding=model.network["block_out_channels"][0])
    net = quantized(model, Recipe(4, 4, Lsq, Lsq, temporal), x, t)

    began, took = [], []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        context = RunContext(place, "", 0, Processes(cpu=True), place)
        training = training_of(model, net, fit_options(updates, batch, 1e-6), context)
        make = training._batch

        def timed(*arguments: Any) -> Any:
            began.append(time.perf_counter())
            made = make(*arguments)
            took.append(time.perf_counter() - began[-1])
            return made

        training._batch = timed  # type: ignore[method-assign,assignment]
        training.run()

    between = [later - earlier for earlier, later in pairwise(began)]
    return {
        "updates": updates,
        "an update": 1e3 * statistics.median(between[WARM_UP:]),
        "making its batch": 1e3 * statistics.median(took[WARM_UP:]),
    }


def measure(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the minimum, median and maximum of every step, milliseconds."""
    # 1. The networks, all of one start.
    model = jobs.make(compose(["model=ddim_small"]), "model.definition")
    torch.manual_seed(0)
    x = torch.randn(batch, *model.sample_shape)
    t = torch.randint(model.schedule.steps, (batch,))

    temporal = TemporalIntervals(encoding=model.network["block_out_channels"][0])
    recipes = {
        "LSQ": Recipe(4, 4, Lsq, Lsq, StaticIntervals()),
        "LSQ+TDQ": Recipe(4, 4, Lsq, Lsq, temporal),
        "LSQ, torch's fused": Recipe(4, 4, TorchFused, TorchFused, StaticIntervals()),
        "LSQ+TDQ, torch's fused": Recipe(4, 4, TorchFused, TorchFused, temporal),
    }
    nets = {"float": model.build()}
    nets |= {name: quantized(model, recipe, x, t) for name, recipe in recipes.items()}

    baked = {name: bake(nets[name]) for name in ("LSQ", "LSQ+TDQ")}
    nets["LSQ+TDQ, generators one by one"] = one_by_one(nets["LSQ+TDQ"])

    # 2. Training steps, in turn.
    training = {f"train {name}": training_step(model, net, x, t) for name, net in nets.items()}
    for name in baked:
        training[f"train {name}, unfused"] = without_kernels(training[f"train {name}"])
    times = medians(training, rounds)

    # 3. Denoising steps, in turn.
    denoising = {"denoise float": denoising_step(model, nets["float"], x)}
    denoising |= {
        f"denoise {name} baked": denoising_step(model, net, x) for name, net in baked.items()
    }
    last = "denoise LSQ+TDQ baked"
    denoising[f"{last}, unfused"] = without_kernels(denoising[last])
    return times | medians(denoising, rounds * 3)


def page(
    times: dict[str, dict[str, float]], loop: dict[str, float], about: dict[str, Any]
) -> list[str]:
    """Return the lines of the Markdown page."""
    steps = [
        f"| {name} | {of['min']:.1f} | {of['median']:.1f} | {of['max']:.1f} |"
        for name, of in times.items()
    ]
    ratios = [
        f"| {name} | {times[ours]['median'] / times[theirs]['median']:.2f} | <= {aim} |"
        for name, (ours, theirs, aim) in AIMS.items()
    ]
    return [
        f"`ddim_small`, batch {about['batch']}, {about['threads']} threads, {about['rounds']} interleaved rounds, "
        f"milliseconds. {about['machine']}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {about['commit']}. `make bench`.",
        "",
        "| step | min | median | max |",
        "|---|---:|---:|---:|",
        *steps,
        "",
        "| ratio of medians | measured | aim |",
        "|---|---:|---:|",
        *ratios,
        "",
        f"The loop of an LSQ+TDQ fit, {loop['updates']} updates: {loop['an update']:.1f} ms an"
        f" update, of which it waits {loop['making its batch']:.2f} ms, or"
        f" {loop['making its batch'] / loop['an update']:.2%}, for its batch (medians).",
    ]


if __name__ == "__main__":
    main()
