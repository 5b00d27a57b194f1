"""Measure what each line of Table 7 costs -> results/bench/cost.json and cost.md.

    python scripts/bench/cost.py [--scales small,digits] [--batch 16] [--rounds 9]

Bit operations and sizes follow from the layers: weights are random and step sizes are those of a
random sample, which changes neither. A step is timed in turn for all lines of a model, on one
thread; its time is divided by the batch. The lines are those of `configs/table/table7.yaml`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from steps import Step, denoising_step, medians, quantized
from torch import nn

from tdq_exp.config.compose import compose
from tdq_exp.deploy import integer, packed
from tdq_exp.deploy.operations import bit_operations, products
from tdq_exp.experiment import build as jobs
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import bake
from tdq_exp.report import cells as report_cells
from tdq_exp.report import pages
from tdq_exp.report.manifest import read_manifest
from tdq_exp.report.text_tables import markdown_lines

RESULTS = Path(__file__).resolve().parents[2] / "results"
UNREAD = ("model.weights=none", "model.autoencoder=none")  # nothing is loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scales", default="small,digits", help="of the manifest")
    parser.add_argument("--batch", type=int, default=16, help="images in a timed step")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each line")
    options = parser.parse_args()

    torch.set_num_threads(1)
    calibrate.KEPT = 512  # a quick search: start values change nothing that is measured here
    runs: dict[str, dict[str, Any]] = {}
    for scale in options.scales.split(","):
        for column in read_manifest("table7").at(scale):
            runs |= costs(scale, column, options.batch, options.rounds)

    about = pages.about(batch=options.batch, rounds=options.rounds, threads=1)
    pages.report(RESULTS / "bench" / "cost", {"runs": runs}, about, page(runs, about))


def costs(scale: str, column: str, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return run -> its cost, for the lines of a column."""
    manifest = read_manifest("table7")
    every = report_cells.cells_of(manifest, scale, RESULTS)
    cells = {cell.run: cell for cell in every if cell.column == column}

    # What follows from the layers.
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for run, cell in cells.items():
        job = jobs.build(compose([*cell.overrides, *UNREAD[: 1 + (column == "ldm")]]), source=False)
        found[run], nets = measured(job, batch)
        x = torch.randn(batch, *job.model.sample_shape)
        steps |= {f"{run} {form}": denoising_step(job.model, net, x) for form, net in nets.items()}

    # What the clock says, all in turn.
    with torch.no_grad():
        for key, times in medians(steps, rounds).items():
            run, _, form = key.partition(" ")
            found[run][f"{form}_ms"] = times["median"] / batch
    return found


def measured(job: jobs.Experiment, batch: int) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Return bit operations and bytes of a job's network, and its forms that can be timed."""
    torch.manual_seed(0)
    model, net = job.model, job.model.build().eval()
    x, t = torch.randn(1, *model.sample_shape), torch.tensor(500)
    counted = products(net, lambda: model.predict(net, x, t))
    operations = bit_operations(counted, model.roles(net), job.recipe)

    if job.recipe is None:
        size = 4 * sum(p.numel() for p in net.parameters())
        return {"bit_operations": operations, "bytes": size}, {"simulated": net}

    x, t = torch.randn(batch, *model.sample_shape), torch.linspace(0, 999, batch).long()
    baked = bake(quantized(model, job.recipe, x, t))
    with tempfile.TemporaryDirectory() as folder:
        size = packed.save(baked.state_dict(), Path(folder) / "net.safetensors", {}, "")

    forms = {"simulated": baked}
    if integer.unavailable(torch.device("cpu")) is None and integer.candidates(baked):
        forms["integer"] = integer.integerize(baked, model.chains(baked))
    return {"bit_operations": operations, "bytes": size}, forms


def page(runs: dict[str, dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown page."""
    headers = [
        "run", "bit operations (10^9)", "size (MB)", "simulated (ms)", "on integers (ms)",
    ]  # fmt: skip
    rows = [
        [
            run,
            f"{cost['bit_operations'] / 1e9:.2f}",
            f"{cost['bytes'] / 1e6:.3f}",
            f"{cost['simulated_ms']:.3f}",
            f"{cost['integer_ms']:.3f}" if "integer_ms" in cost else "-",
        ]
        for run, cost in runs.items()
    ]
    return [
        "# Cost of one denoising step of one image",
        "",
        *markdown_lines(headers, rows),
        "",
        f"One thread, batches of {about['batch']}, medians of {about['rounds']} steps in turn;"
        f" {about['machine']}, commit {about['commit']}. Float networks are timed as they are."
        " Sizes are those of packed files, weights of float layers at 32 bits.",
    ]


if __name__ == "__main__":
    main()
