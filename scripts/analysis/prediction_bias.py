"""How much of a quantized network's error is the same in every image -> prediction_bias.json, .md.

    python scripts/analysis/prediction_bias.py results/runs/NAME/seed0 ... [--images 64] [--steps 25]
    python scripts/analysis/prediction_bias.py ... --last     the last weights beside their average

A training sees the mean square of the error e = eps_hat - eps_hat_float. Sampling adds errors up:
what varies from step to step averages out, what stays the same does not. At x_t of the float
model's own trajectories, for each run:

    rms      sqrt(mean e^2)
    bias     root of the mean over channels and t of b^2, b = mean of e over images and places
    steady   the same of b's mean over t: what every step adds in one direction
    k        cov(e, eps) / var(eps) at the last step, and its mean over the others: how much too
             little noise is predicted (`fit.correction` divides by 1 + k)

and, with each network following its own trajectory, from the same noise x_T as the float model:

    left     <x_0 - x_0_float, x_T> / <x_T, x_T>: noise that is still in the images
    shift    mean of each channel of its images less the float model's, in levels of 255

k and left are taken of batches of 32 images, and averaged.

A k of a few thousandths at every step counts: unlike errors that change from step to step, it
adds up in `left`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
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
from tdq_exp.fit.checkpoint import load_state
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant import bake, set_final_phase
from tdq_exp.report import pages
from tdq_exp.runtime.processes import Processes

BATCH = 32  # images at a time


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of quantized runs, or packed nets"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--last", action="store_true", help="measure the last weights beside their average"
    )
    parser.add_argument("--out", type=Path, default=Path("results/analysis"))
    return cli.exit_code(measure, parser.parse_args())


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Measure every run, and write the report.

    Raises:
        ValueError, OSError: if a run is not there.
    """
    processes = Processes(cpu=True)
    results, lines = {}, []
    for run in options.runs:
        job, net = load(run)
        float_net, _ = fit_stage.float_net(job, processes)
        if not isinstance(job.sampler, Ddim):
            raise ValueError(f"{run}: is sampled by another method than DDIM")
        sampler = dataclasses.replace(job.sampler, steps=options.steps)

        title = f"{job.name}/seed{job.seed}"
        networks = {title: net}
        if options.last and job.config["fit"]["correction"] == "none":  # else it is the average's
            networks[f"{title}, last weights"] = _last_network(job)

        for name, network in networks.items():
            pair = Denoiser(network.eval(), job.model), Denoiser(float_net.eval(), job.model)
            found = _of_run(*pair, sampler, options.images)
            results[name] = found
            lines.append(_line(name, found))

    head = [
        "# Errors that every image shares",
        "",
        f"{options.images} images, {options.steps} steps of DDIM. e is the quantized network's"
        " prediction less the float one's at the same x_t, b its mean over images and places.",
        "`scripts/analysis/prediction_bias.py` says what each column is.",
        "",
        "| run | rms of e | rms of b | rms of b's mean over t | b^2 / e^2 | k, last step | k, others |"
        " noise left | mean of the images' channels less the float model's, levels |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    about = pages.about(images=options.images, steps=options.steps)
    pages.report(options.out / "prediction_bias", {"runs": results}, about, [*head, *lines])


def _last_network(job: Experiment) -> nn.Module:
    """Return the network of the last update's weights, baked.

    Raises:
        ValueError: if the training's state is not there.
    """
    file = job.folder / "state.pt"
    state = load_state(file) if file.exists() else None
    if state is None:
        raise ValueError(f"{file}: is not here; the state of a training stays where it was made")

    net = job.fit.skeleton(job.model, job.recipe)
    net.load_state_dict(state["net"])
    set_final_phase(net, True)
    return bake(net, inplace=True)


def _line(name: str, found: dict[str, Any]) -> str:
    shift = ", ".join(f"{value:+.1f}" for value in found["shift"])
    k = statistics.fmean(found["k"][:-1])
    return (
        f"| {name} | {found['rms']:.4f} | {found['bias']:.4f} | {found['steady']:.4f} |"
        f" {100 * found['share']:.1f} % | {found['k'][-1]:.3f} | {k:+.4f} |"
        f" {found['left']:+.4f} | {shift} |"
    )


def _of_run(quantized: Denoiser, float_net: Denoiser, sampler: Ddim, images: int) -> dict[str, Any]:
    """Return what is measured of one network, of `images` images."""
    model = quantized.model
    counts: list[int] = []  # of images; the last batch may have fewer
    squares: list[list[Tensor]] = []
    means: list[list[Tensor]] = []
    slopes: list[list[Tensor]] = []
    left: list[Tensor] = []
    ends: dict[str, list[Tensor]] = {"quantized": [], "float": []}

    for start in range(0, images, BATCH):
        generators = image_generators(0, range(start, min(start + BATCH, images)))
        x = starting_noise(generators, model.sample_shape)

        # 1. Both predictions along the float model's way.
        of_steps: list[Tensor] = []
        slope: list[Tensor] = []
        square: list[Tensor] = []

        def compare(
            x_t: Tensor,
            t: Tensor,
            square: list[Tensor] = square,
            of_steps: list[Tensor] = of_steps,
            slope: list[Tensor] = slope,
        ) -> Tensor:
            eps = float_net(x_t, t)
            error, centred = quantized(x_t, t) - eps, eps - eps.mean()
            square.append(error.square().mean())
            of_steps.append(error.mean((0, 2, 3)))
            slope.append((centred * error).mean() / centred.square().mean())
            return eps

        x_0_float = sampler.sample(compare, x, model.schedule, generators)
        ends["float"].append(model.decode(x_0_float))
        counts.append(len(x))
        squares.append(square)
        means.append(of_steps)
        slopes.append(slope)

        # 2. The quantized network's own way.
        generators = image_generators(0, range(start, min(start + BATCH, images)))
        x_0 = sampler.sample(quantized, x, model.schedule, generators)
        ends["quantized"].append(model.decode(x_0))
        left.append(((x_0 - x_0_float) * x).mean() / x.square().mean())

    def over_images(of_batches: list[list[Tensor]]) -> Tensor:
        """Return the mean over images of what was measured of each batch, [steps, ...]."""
        stacked = torch.stack([torch.stack(values) for values in of_batches])
        shares = torch.tensor(counts).to(stacked) / images
        return torch.tensordot(shares, stacked, dims=1)

    b = over_images(means)  # [steps, channels]
    rms, bias = over_images(squares).mean().sqrt(), b.square().mean().sqrt()
    colours = {
        name: torch.cat(parts).clamp(-1, 1).mean((0, 2, 3)) * 127.5 for name, parts in ends.items()
    }
    return {
        "rms": float(rms),
        "bias": float(bias),
        "steady": float(b.mean(0).square().mean().sqrt()),
        "share": float((bias / rms).square()),
        "left": float(over_images([[value] for value in left])),
        "k": over_images(slopes).tolist(),
        "shift": [round(float(v), 2) for v in colours["quantized"] - colours["float"]],
        "over_t": [[round(float(v), 5) for v in step] for step in b],
    }


if __name__ == "__main__":
    sys.exit(main())
