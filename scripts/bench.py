"""Speed of a training step and of a denoising step on `ddim_small`: medians of interleaved runs -> results/bench/qat.md.

    python scripts/bench.py [--threads 2] [--rounds 15] [--batch 64]

Everything is compared within one process, in turn, so that a machine whose speed drifts slows all of it alike. Beside
our quantizers: the same without our fused kernels, with torch's own fused learnable fake-quantize (per channel, the batch as the channel
axis, where every sample has a step size of its own), and with TDQ's generators evaluated one by one.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.calibrate import calibrating
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import GeneratorBank, Temporal, TemporalIntervals, encode_time
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.kernels import unfused
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.runtime import environment, files

AIMS = {
    "LSQ / float, training step": ("train LSQ", "train float", 1.4),
    "LSQ+TDQ / LSQ, training step": ("train LSQ+TDQ", "train LSQ", 1.1),
    "baked W4A4 LSQ+TDQ / float, denoising step": ("denoise LSQ+TDQ baked", "denoise float", 1.2),
}


class TorchFused(Lsq):
    """LSQ by torch's fused learnable fake-quantize kernels."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        """x_hat with torch's gradients of x, s and z."""
        z = self.zero if z is None else z
        n, p, scale = self.grid.n, self.grid.p, 1.0
        if s.numel() == 1 and z.numel() == 1:
            fused = torch._fake_quantize_learnable_per_tensor_affine
            return fused(x, s.reshape(1), z.reshape(1), n, p, scale)
        steps, zeros = s.reshape(-1), z.reshape(-1).expand(len(x)).contiguous()
        return torch._fake_quantize_learnable_per_channel_affine(x.contiguous(), steps, zeros, 0, n, p, scale)


class OneByOne(Interval):
    """A generator of its own for one quantizer, evaluated when it is asked."""

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


def quantized(model: DiffusionModel, recipe: Recipe, x: Tensor, t: Tensor) -> nn.Module:
    """A calibrated network in training form."""
    net = model.build()
    model.quantize(net, recipe)
    with calibrating(net.eval(), 1), torch.no_grad():
        model.predict(net, x, t)
    return net.train()


def one_by_one(net: nn.Module) -> nn.Module:
    """The same network with every generator by itself."""
    net = copy.deepcopy(net)
    for quantizer in activation_quantizers(net).values():
        interval = quantizer.interval
        assert isinstance(interval, Temporal)
        quantizer.interval = OneByOne(interval.bank, interval.row)
    del net.generators
    return net


def training_step(model: DiffusionModel, net: nn.Module, x: Tensor, t: Tensor) -> Callable[[], object]:
    """Forward, backward and optimiser step of one batch."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model.predict(net, x, t) - x).square().mean().backward()
        optimizer.step()

    return step


def denoising_step(model: DiffusionModel, net: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward pass at one time step for the whole batch."""
    net.eval()

    @torch.no_grad()
    def step() -> Tensor:
        return model.predict(net, x, torch.tensor(500))

    return step


def without_kernels(step: Callable[[], object]) -> Callable[[], object]:
    """The same step with one operation after another in the place of fused kernels."""

    def run() -> None:
        with unfused():
            step()

    return run


def medians(steps: dict[str, Callable[[], object]], rounds: int, pause: float = 0.0) -> dict[str, dict[str, float]]:
    """Runs everything in turn; minimum, median and maximum in milliseconds.

    Args:
        pause: seconds before each, for steps of different thread pools, which go on spinning for a while.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            time.sleep(pause)
            began = time.perf_counter()
            step()
            if round_ >= 2:  # two rounds to warm up
                times[name].append(1e3 * (time.perf_counter() - began))
    return {n: {"min": min(v), "median": sorted(v)[len(v) // 2], "max": max(v)} for n, v in times.items()}


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default: 15)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of qat.md and qat.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if isinstance(kernels.library(), str):
        raise SystemExit(f"there are no fused kernels here: {kernels.library()}")
    model = jobs.make(compose(["model=ddim_small"]), "model.definition")
    torch.manual_seed(0)
    x = torch.randn(options.batch, *model.sample_shape)
    t = torch.randint(model.schedule.steps, (options.batch,))
    temporal = TemporalIntervals(encoding=model.network["block_out_channels"][0])
    nets = {
        "float": model.build(),
        "LSQ": quantized(model, Recipe(4, 4, Lsq, Lsq, StaticIntervals()), x, t),
        "LSQ+TDQ": quantized(model, Recipe(4, 4, Lsq, Lsq, temporal), x, t),
        "LSQ, torch's fused": quantized(model, Recipe(4, 4, TorchFused, TorchFused, StaticIntervals()), x, t),
        "LSQ+TDQ, torch's fused": quantized(model, Recipe(4, 4, TorchFused, TorchFused, temporal), x, t),
    }
    baked = {f"denoise {name} baked": denoising_step(model, bake(nets[name]), x) for name in ("LSQ", "LSQ+TDQ")}
    nets["LSQ+TDQ, generators one by one"] = one_by_one(nets["LSQ+TDQ"])
    training = {f"train {name}": training_step(model, net, x, t) for name, net in nets.items()}
    training |= {f"train {name}, unfused": without_kernels(training[f"train {name}"]) for name in ("LSQ", "LSQ+TDQ")}
    found = medians(training, options.rounds)
    denoising = {"denoise float": denoising_step(model, nets["float"], x), **baked}
    denoising["denoise LSQ+TDQ baked, unfused"] = without_kernels(baked["denoise LSQ+TDQ baked"])
    found |= medians(denoising, options.rounds * 3)
    write(found, options)


def write(found: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """`qat.json` with every figure, `qat.md` to read."""
    about = {"threads": options.threads, "rounds": options.rounds, "batch": options.batch, **environment.environment()}
    files.write_json(options.out / "qat.json", {"milliseconds": found, "about": about})
    lines = [
        f"`ddim_small`, batch {options.batch}, {options.threads} threads, {options.rounds} interleaved rounds, "
        f"milliseconds. {about['machine']}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {about['commit']}. `make bench`.",
        "",
        "| step | min | median | max |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {v['min']:.1f} | {v['median']:.1f} | {v['max']:.1f} |" for name, v in found.items()),
        "",
        "| ratio of medians | measured | aim |",
        "|---|---:|---:|",
        *(f"| {k} | {found[a]['median'] / found[b]['median']:.2f} | <= {aim} |" for k, (a, b, aim) in AIMS.items()),
    ]
    (options.out / "qat.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
