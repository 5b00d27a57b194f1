"""Measure seconds and peak memory of a denoising step of a full-size network -> results/bench/large.md.

    python scripts/bench/large.py [--experiment ldm_w8a8_lsq_tdq] [--batches 1 4] [--rounds 5]
        [--threads 2]

Each form of the network runs in a process of its own, so that peak memory is its alone: Python and
its libraries (`baseline`) included. Weights are random and step sizes are 1, of which neither
seconds nor bytes depend.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.config.compose import compose
from tdq_exp.deploy import integer
from tdq_exp.experiment import build as jobs
from tdq_exp.fit.quantized import skeleton
from tdq_exp.quant.convert import bake
from tdq_exp.report import pages
from tdq_exp.report.text_tables import markdown_lines
from tdq_exp.runtime import environment

FORMS = {
    "baseline": "Python and its libraries",
    "float": "float32",
    "fake": "simulated quantization, baked",
    "integer": "integers",
}


def job_of(experiment: str) -> jobs.Experiment:
    """The experiment, its weights not looked for."""
    overrides = [f"+experiment={experiment}", "model.weights=none.safetensors"]
    return jobs.build(compose(overrides), source=False)


def network(job: jobs.Experiment, form: str) -> nn.Module:
    """The network in a form, in eval mode."""
    if form == "float":
        return job.model.build().eval()
    assert job.recipe is not None
    net = bake(skeleton(job.model, job.recipe), inplace=True)
    if form == "integer":
        return integer.integerize(net, job.model.chains(net))
    return net


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One form: seconds of a step for each batch size, and the peak memory, GB, when that batch had been run."""
    torch.set_num_threads(options.threads)
    job = job_of(options.experiment)
    if options.form == "baseline":
        return {"memory": environment.peak_memory_gb(), "steps": {}}
    net, steps = network(job, options.form), {}
    built = environment.peak_memory_gb()
    for batch in options.batches:
        x, times = torch.randn(batch, *job.model.sample_shape), []
        for _ in range(options.rounds + 1):
            began = time.perf_counter()
            job.model.predict(net, x, torch.tensor(500))
            times.append(time.perf_counter() - began)
        steps[str(batch)] = {"seconds": sorted(times[1:]), "memory": environment.peak_memory_gb()}
    return {
        "parameters": sum(p.numel() for p in job.model.build().parameters()),
        "memory": built,
        "steps": steps,
    }


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiment", default="ldm_w8a8_lsq_tdq", help="a quantized experiment")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4], help="batch sizes, rising (default: 1 4)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder to write")
    parser.add_argument(
        "--form", choices=FORMS, help="measure this one alone, in this process, and print it"
    )
    options = parser.parse_args()
    if options.form is not None:
        print(json.dumps(measure(options)))
        return

    measured = {}
    for form in FORMS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--form", form], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"error: {form}: {done.stderr.strip().splitlines()[-1]}")
        measured[form] = json.loads(done.stdout.splitlines()[-1])

    about = pages.about(
        experiment=options.experiment, threads=options.threads, rounds=options.rounds
    )
    lines = page(measured, about, [str(batch) for batch in options.batches])
    pages.report(options.out / "large", {"forms": measured}, about, lines)


def page(measured: dict[str, Any], about: dict[str, Any], batches: list[str]) -> list[str]:
    """Return the lines of the Markdown page."""
    rows = [[FORMS["baseline"], "-", "-", "-", f"{measured['baseline']['memory']:.2f}"]]

    for batch in batches:
        reference = middle(measured["float"]["steps"][batch]["seconds"])
        for form in list(FORMS)[1:]:
            step = measured[form]["steps"][batch]
            seconds = middle(step["seconds"])
            rows.append(
                [
                    FORMS[form],
                    batch,
                    f"{seconds:.2f}",
                    f"{seconds / reference:.2f}",
                    f"{step['memory']:.2f}",
                ]
            )

    headers = [
        "network",
        "batch",
        "s for a step, median",
        "of float's",
        "peak memory of the process, GB",
    ]
    return [
        f"`{about['experiment']}`: one denoising step of a U-Net of {measured['float']['parameters']:,} parameters,"
        f" {about['threads']} threads, medians of {about['rounds']}; peak memory includes building the network."
        f" {about['machine']}, torch {torch.__version__}, Python {platform.python_version()}, commit {about['commit']}."
        f" `python scripts/bench/large.py`.",
        "",
        *markdown_lines(headers, rows),
    ]


def middle(values: list[float]) -> float:
    """Median of sorted values."""
    return values[len(values) // 2]


if __name__ == "__main__":
    main()
