"""Find which quantizers make the bright dots of a quantized network's images -> results/analysis/outliers.md.

    python scripts/analysis/outliers.py results/runs/ddim_small_w4a4_lsq_release/seed0 ... [--images 32] [--steps 25]

An outlier is an element of x_0, before decoding, more than `--times` as large as the float
network's largest from the same noise. A network is sampled as it is, then with some of its
activation quantizers switched off: all of them, those of a role (convolutions, shortcuts, ...), and
each by itself. What an outlier share loses without a quantizer is what that quantizer makes,
together with all others. Weights stay quantized.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.analysis.quantizers import switched_off
from tdq_exp.commands import cli
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment import fit_stage
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.finished_run import load
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant.convert import activation_quantizers, attention_role
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.report import pages
from tdq_exp.report.axes import short_name
from tdq_exp.report.text_tables import markdown_lines
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track

SHOWN = 4  # single quantizers of each network that the page names


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or packed networks")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25, help="of the sampling")
    parser.add_argument("--times", type=float, default=1.5, help="the float network's largest")
    parser.add_argument("--out", type=Path, default=Path("results/analysis"))
    return cli.exit_code(measure, parser.parse_args())


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Measure every run, and write the page.

    Raises:
        ValueError, OSError: if a run is not there, or is sampled by another method than DDIM.
    """
    processes = Processes(cpu=True)
    results, rows = {}, []
    for run in options.runs:
        job, net = load(run)
        float_net, _ = fit_stage.float_net(job, processes)
        shares = _shares(job, net, float_net, options)
        results[f"{job.name}/seed{job.seed}"] = shares
        rows += _rows(f"{job.name}/seed{job.seed}", shares)

    page = [
        "# Which quantizers make outliers",
        "",
        f"{options.images} images, {options.steps} steps of DDIM. Shares of the elements of x_0 that"
        f" are more than {options.times:g} times as large as the float network's largest, in"
        " thousandths, with some activation quantizers switched off.",
        "",
        *markdown_lines(
            ["network", "switched off", "quantizers", "outliers, per mille"], rows, left=2
        ),
    ]
    about = pages.about(images=options.images, steps=options.steps, times=options.times)
    pages.report(options.out / "outliers", {"runs": results}, about, page)


def _shares(
    job: Experiment, net: nn.Module, float_net: nn.Module, options: argparse.Namespace
) -> dict[str, Any]:
    """Return what is switched off -> number of quantizers and share of outliers.

    Raises:
        ValueError: if the run is sampled by another method than DDIM.
    """
    if not isinstance(job.sampler, Ddim):
        raise ValueError(f"{job.name}: is sampled by another method than DDIM")
    sampler = dataclasses.replace(job.sampler, steps=options.steps, eta=0.0)
    noise = starting_noise(image_generators(0, range(options.images)), job.model.sample_shape)

    def sampled(network: nn.Module) -> Tensor:
        return sampler.sample(Denoiser(network.eval(), job.model), noise, job.model.schedule)

    bound = options.times * sampled(float_net).abs().max()
    shares = {}
    choices = _choices(job, net)
    with track(f"choices of {job.name}", len(choices)) as advance:
        for name, quantizers in choices.items():
            with switched_off(*quantizers):
                share = float((sampled(net).abs() > bound).float().mean())
            shares[name] = {"quantizers": len(quantizers), "outliers": share}
            advance(name)
    return shares


def _choices(job: Experiment, net: nn.Module) -> dict[str, list[Quantizer]]:
    """Return name -> activation quantizers that are switched off together."""
    quantizers = activation_quantizers(net)
    roles = job.model.roles(job.model.build())

    of_role = defaultdict(list)
    for name, quantizer in quantizers.items():
        layer = name.rpartition(".")[0]
        role = roles.get(layer)
        of_role[attention_role(name) if role is None else role.kind].append(quantizer)

    return {
        "none": [],
        "all": list(quantizers.values()),
        **{f"role: {role}": members for role, members in of_role.items()},
        **{name.removesuffix("_quantizer"): [q] for name, q in quantizers.items()},
    }


def _rows(network: str, shares: dict[str, Any]) -> list[list[str]]:
    """Return the lines of a network: groups, then the single quantizers without which least remain."""
    groups = [name for name in shares if name in ("none", "all") or name.startswith("role: ")]
    alone = [name for name in shares if name not in groups]
    alone.sort(key=lambda name: shares[name]["outliers"])

    return [
        [
            network,
            short_name(name),
            str(shares[name]["quantizers"]),
            f"{1000 * shares[name]['outliers']:.2f}",
        ]
        for name in [*groups, *alone[:SHOWN]]
    ]


if __name__ == "__main__":
    sys.exit(main())
