"""Measure the speed of block reconstruction on `ddim_small`, and of MinMax -> results/bench/ptq.md.

    python scripts/bench/ptq.py [--threads 2] [--updates 30] [--rounds 5]

Static and TDQ's reconstruction of the same block are timed in turn in one process. The whole fits
of `ddim_small` are read from their rows. Weights are random: they do not change how long anything
takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.config.compose import compose
from tdq_exp.diffusion.objective import NetworkInput
from tdq_exp.experiment import build as jobs
from tdq_exp.fit import calibrated as calibration
from tdq_exp.fit.calibrated import BATCH, Batches
from tdq_exp.fit.options import PtqOptions, ReconstructOptions
from tdq_exp.fit.ptq.block_by_block import capture
from tdq_exp.fit.ptq.blocks import blocks_of
from tdq_exp.fit.ptq.reconstruct import BlockData, Reconstruction
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import Recipe, code_weights
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.report import pages
from tdq_exp.runtime import files
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes

AIM = 1.15
SAMPLES = 256
FITS = ("minmax", "ptq4dm", "ptq4dm_tdq")


def shown_noise(model: DiffusionModel, samples: int) -> Batches:
    """Random samples at random time steps."""
    x = torch.randn(samples, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.randint(model.schedule.steps, (samples,), generator=torch.Generator().manual_seed(1))

    def get(number: int) -> NetworkInput:
        part = slice(number * BATCH, (number + 1) * BATCH)
        return NetworkInput(x[part], t[part])

    return Batches(samples, get)


def calibrated(
    model: DiffusionModel, recipe: Recipe, shown: Batches, processes: Processes
) -> nn.Module:
    """A quantized network with start values; nothing is cached."""
    with tempfile.TemporaryDirectory() as cache:
        net = model.build().to(processes.device).eval()
        context = RunContext(Path(cache), "", 0, processes, Path(cache))
        return calibration.calibrated(net, model, recipe, shown, context, key={})


def block_seconds(
    model: DiffusionModel, processes: Processes, updates: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds for 1,000 updates of each block, static and TDQ: medians of interleaved updates."""
    shown = shown_noise(model, SAMPLES)
    intervals: dict[str, Any] = {
        "static": StaticIntervals(),
        "TDQ": TemporalIntervals(encoding=model.network["block_out_channels"][0]),
    }
    nets, float_net = {}, model.build().to(processes.device).eval()
    for name, made in intervals.items():
        recipe = Recipe(8, 4, MinMaxWeights, Lsq, made, weight_interval="channel_range")
        nets[name] = calibrated(model, recipe, shown, processes)
        code_weights(nets[name])
        for parameter in nets[name].parameters():
            parameter.requires_grad_(False)
    blocks = {name: blocks_of(net, model, model.roles(float_net)) for name, net in nets.items()}
    options = ReconstructOptions(updates, 32, 1e-3, 1e-3, 1e-3)
    every = torch.cat([shown.get(n)[1] for n in range(len(shown))])
    index = torch.arange(SAMPLES)
    found = {}
    for number in range(len(blocks["static"])):
        works = {}
        for name, net in nets.items():
            block = blocks[name][number]
            with tempfile.TemporaryDirectory() as folder:
                seen = capture(
                    net,
                    float_net,
                    model,
                    shown,
                    block,
                    PtqOptions.memory_gb,
                    Path(folder),
                    processes,
                )
            for quantizer in block.quantizers.values():
                quantizer.requires_grad_(True)
            data = BlockData(*seen, every, index, index)
            works[name] = Reconstruction(net, block, data, options, (0, number), processes)
        times = interleaved(works, rounds)
        found[blocks["static"][number].name] = {
            name: 1000 * seconds for name, seconds in times.items()
        }
    return found


def interleaved(works: dict[str, Reconstruction], rounds: int) -> dict[str, float]:
    """Median seconds of an update of each, their stretches of updates taken in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work.train_activations(lambda remark: None)
            times[name].append((time.perf_counter() - began) / work.options.updates)
    return {name: sorted(values[1:])[rounds // 2] for name, values in times.items()}


def minmax_seconds(processes: Processes) -> float:
    """Calibration of `ddim_cifar10` with MinMax over 256 samples, their making excluded."""
    model = jobs.make(compose(["model=ddim_cifar10"]), "model.definition")
    shown = shown_noise(model, SAMPLES)
    began = time.perf_counter()
    calibrated(
        model,
        Recipe(8, 8, MinMaxWeights, MinMax, weight_interval="channel_range"),
        shown,
        processes,
    )
    return time.perf_counter() - began


def whole_fits(out: Path) -> list[str]:
    """Lines of the whole fits of `ddim_small` at W8A5, from their rows, if they were made."""
    lines = []
    for name in FITS:
        found = files.read_json(out / "runs" / f"ddim_small_w8a5_{name}" / "seed0" / "fit.json")
        if found is not None and found["done"]:
            facts = found["facts"]
            lines.append(f"| {name} | {facts['seconds']:.0f} | {facts['peak_memory_gb']} |")
    return lines


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument(
        "--updates",
        type=int,
        default=30,
        help="updates of a stretch; each makes its optimiser anew (default: 30)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="counted stretches of each (default: 5)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of results (default: results)"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    processes = Processes(cpu=True)
    model = jobs.make(compose(["model=ddim_small"]), "model.definition")
    blocks = block_seconds(model, processes, options.updates, options.rounds)
    minmax = minmax_seconds(processes)

    about = pages.about(threads=options.threads)
    measured = {"seconds_per_1000_updates": blocks, "minmax_ddim_cifar10_256_samples": minmax}
    work = f"medians of {options.rounds} interleaved stretches of {options.updates} updates"
    lines = page(blocks, minmax, about, work) + page_of_fits(options.out)
    pages.report(options.out / "bench" / "ptq", measured, about, lines)


def page(
    blocks: dict[str, dict[str, float]], minmax: float, about: dict[str, Any], work: str
) -> list[str]:
    """Return the lines of the Markdown page, whole fits left out."""
    total = {name: sum(times[name] for times in blocks.values()) for name in ("static", "TDQ")}
    rows = [
        f"| {name} | {times['static']:.1f} | {times['TDQ']:.1f} | {times['TDQ'] / times['static']:.2f} |"
        for name, times in {**blocks, "all blocks": total}.items()
    ]
    return [
        f"`ddim_small`, batch 32, W8A4, {about['threads']} threads, {work}."
        f" {about['machine']}, torch {torch.__version__}, commit {about['commit']}. `make bench`.",
        "",
        "| block | static, s for 1,000 updates | TDQ | ratio |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        f"Aim: TDQ's reconstruction at most {AIM} times the static one.",
        f"MinMax of `ddim_cifar10`, 256 samples, making the set excluded: {minmax:.0f} s (aim: under 300).",
    ]


def page_of_fits(out: Path) -> list[str]:
    """Return the lines about whole fits, if their rows were made."""
    fits = whole_fits(out)
    if not fits:
        return []
    return [
        "",
        "| whole fit, ddim_small W8A5, making the set excluded | seconds | peak memory, GB |",
        "|---|---:|---:|",
        *fits,
    ]


if __name__ == "__main__":
    main()
