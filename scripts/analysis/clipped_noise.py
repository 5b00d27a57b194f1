"""Measure what the first layer's quantizer cuts off the starting noise -> results/analysis/clipped_noise.md.

    python scripts/analysis/clipped_noise.py results/runs/ldm_small_w4a4_lsq/seed0/packed.safetensors ... [--images 100]

Why it matters: `tdq_exp/experiment/first_layer.py`. Places (pixels of x) with an element beyond the
range are told from all others; each network is then sampled a second time, from the same noise,
with the input of its first layer left in float. An outlier is an element of x_0 more than twice as
large as the float network's largest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.commands import cli
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment import fit_stage
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.finished_run import load
from tdq_exp.experiment.first_layer import first_range
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.report import pages
from tdq_exp.report.text_tables import markdown_lines
from tdq_exp.runtime.processes import Processes

HEADERS = (
    "network", "input of the first layer", "places beyond it", "error there", "error elsewhere", "largest x_0",
    "of float's", "outliers", "of them there",
)  # fmt: skip


@torch.no_grad()
def drawn(job: Experiment, net: nn.Module, x_t: Tensor) -> Tensor:
    """x_0, before decoding, of the noise that a row's first images start from."""
    return job.sampler.sample(Denoiser(net, job.model), x_t, job.model.schedule)


def analyse(job: Experiment, net: nn.Module, x_t: Tensor, expected: Tensor) -> list[dict[str, Any]]:
    """A record for the network as it is, and one with its first layer's input in float.

    Raises:
        ValueError: if nothing can be cut off, or the sampler is not DDIM.
    """
    if not isinstance(job.sampler, Ddim):
        raise ValueError(
            f"{job.name}: was measured with {type(job.sampler).__name__}; this is about DDIM's first step"
        )
    roles = job.model.roles(job.model.build())
    limits = first_range(net, roles, job.sampler.pairs(job.model.schedule)[0][0])
    if limits is None:
        raise ValueError(
            f"{job.name}: its first layer's input is float, or has the range of what it sees"
        )
    low, high = limits
    layer = net.get_submodule(next(name for name, role in roles.items() if role.kind == "first"))
    beyond = ((x_t < low) | (x_t > high)).any(1, keepdim=True).expand_as(x_t)
    found = []
    for form in (f"{low:.2f}..{high:.2f}", "float"):
        if form == "float":
            layer.input_quantizer = nn.Identity()  # type: ignore[assignment]
        x_0 = drawn(job, net, x_t)
        error = (x_0 - expected).square()
        there, elsewhere = (
            float(error[at].mean().sqrt()) if at.any() else None for at in (beyond, ~beyond)
        )
        largest, reference = float(x_0.abs().max()), float(expected.abs().max())
        outliers = x_0.abs() > 2 * reference
        found.append(
            {
                "name": job.name, "range": form, "share": float(beyond.float().mean()), "error_there": there,
                "error_elsewhere": elsewhere, "largest": largest, "largest_of_float": largest / reference,
                "outliers": float(outliers.float().mean()),
                "outliers_there": float(beyond[outliers].float().mean()) if outliers.any() else None,
            }
        )  # fmt: skip
    return found


def main() -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of quantized runs, or their packed files"
    )
    parser.add_argument("--images", type=int, default=100, help="drawn from each (default: 100)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/analysis"), help="folder to write"
    )
    return cli.exit_code(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Sample each network twice from the same noise, as it is and with its first layer's input in float.

    Raises:
        ValueError, OSError: if a run is not there, or nothing can be cut off in it.
    """
    torch.set_num_threads(options.threads)
    processes = Processes(cpu=True)
    records: list[dict[str, Any]] = []
    gains: dict[str, float] = {}

    try:
        for run in options.runs:
            job, net = load(run)
            float_net, _ = fit_stage.float_net(job, processes)
            x_t = starting_noise(image_generators(0, range(options.images)), job.model.sample_shape)
            records += analyse(job, net, x_t, drawn(job, float_net, x_t))
            abar = float(
                job.model.schedule.alphas_cumprod[job.sampler.pairs(job.model.schedule)[0][0]]
            )
            gains[job.config["model"]["label"]] = ((1 - abar) / abar) ** 0.5
    finally:
        processes.close()

    about = pages.about(images=options.images, gains=gains)
    lines = page(
        records,
        about,
        f"python scripts/analysis/clipped_noise.py {' '.join(map(str, options.runs))}",
    )
    pages.report(options.out / "clipped_noise", {"networks": records}, about, lines)


def page(records: list[dict[str, Any]], about: dict[str, Any], command: str) -> list[str]:
    """Return the lines of the Markdown page."""
    gains = ", ".join(f"{gain:.1f} times for {model}" for model, gain in about["gains"].items())
    return [
        f"x_0 (before decoding) of {about['images']} images against the float network's, from the same noise: root mean"
        " square error at places where some element of x_T is beyond the range of the first layer's input at the first"
        " step, and at all others; outliers are elements over twice the float network's largest. That step turns an"
        f" error of eps into a larger one of x_0: {gains}. Commit {about['commit']}. `{command}`.",
        "",
        *markdown_lines(HEADERS, [_texts(record) for record in records], left=2),
    ]


def _texts(record: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    errors = [record["error_there"], record["error_elsewhere"]]
    there = record["outliers_there"]
    return [
        record["name"],
        record["range"],
        f"{record['share']:.3f}",
        *("-" if error is None else f"{error:.3f}" for error in errors),
        f"{record['largest']:.1f}",
        f"{record['largest_of_float']:.1f}",
        f"{record['outliers']:.4f}",
        "-" if there is None else f"{there:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
