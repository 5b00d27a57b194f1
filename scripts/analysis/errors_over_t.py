"""Measure where over t a post-training run errs: samples, gain, error and share of the reconstruction's loss, by time step.

    python scripts/analysis/errors_over_t.py results/runs/ddim_small_w8a8_ptq4dm/seed0/packed.safetensors ...

Every run is shown the calibration set of the first one's law (made anew: no data set is needed),
and compared with its float network. The gain is <eps_hat, eps> / <eps, eps> - 1 for the float
prediction eps: what the prediction lost or won in size.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tdq_exp.commands import cli
from tdq_exp.experiment import fit_stage
from tdq_exp.experiment.finished_run import load
from tdq_exp.fit.ptq.calibration_set import make_set
from tdq_exp.fit.ptq.ptq import Ptq
from tdq_exp.fit.ptq.reconstruct import sample_losses
from tdq_exp.fit.ptq.stored_set import CalibrationSet
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import print_table

BATCH = 64  # samples at a time
EDGES = (0, 1, 50, 200, 500, 800)  # of groups of t; the last one ends with T


@torch.no_grad()
def predictions(model: DiffusionModel, net: nn.Module, samples: CalibrationSet) -> Tensor:
    """Return eps_hat of every sample of a set, `[N, C, H, W]`."""
    starts = range(0, len(samples), BATCH)
    parts = [samples.batch(slice(start, start + BATCH)) for start in starts]
    return torch.cat([model.predict(net, *part) for part in parts])


def main() -> int:
    """Prints one table for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of post-training runs, or their packed files"
    )
    parser.add_argument(
        "--images", type=int, help="trajectories of the set (default: as the run had)"
    )
    return cli.exit_code(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Print the errors of each run, group of time steps by group.

    Raises:
        ValueError, OSError: if a run is not there, or the first one is no post-training run.
    """
    # 1. The networks, and the law of the calibration set.
    processes = Processes(cpu=True)
    loaded = [load(run) for run in options.runs]
    job = loaded[0][0]
    fit = job.fit
    if not isinstance(fit, Ptq):
        raise ValueError(f"{options.runs[0]}: is not a post-training run")

    each = fit.calibration.samples // fit.calibration.images
    images = options.images or fit.calibration.images
    spec = dataclasses.replace(fit.calibration, images=images, samples=images * each)
    float_net, weights = fit_stage.float_net(job, processes)

    # 2. The set, made anew.
    with tempfile.TemporaryDirectory() as cache:
        parts = spec.parts(job.part("model"), weights, dataclasses.asdict(fit.trajectory), "none")
        made = make_set(
            spec,
            Denoiser(float_net, job.model),
            fit.trajectory,
            None,
            parts=parts,
            cache=Path(cache),
            processes=processes,
        )
        t = made.times()
        eps = predictions(job.model, float_net, made)
        found = [predictions(job.model, net, made) for _, net in loaded]

    # 3. Each network's errors on it.
    groups = torch.bucketize(t, torch.tensor(EDGES), right=True) - 1
    ends = [*EDGES[1:], job.model.schedule.steps]
    for run, eps_hat in zip(options.runs, found, strict=True):
        losses = sample_losses(eps_hat, eps, fit.options.power)
        rows = []
        for group, (start, end) in enumerate(zip(EDGES, ends, strict=True)):
            inside = groups == group
            a, b = eps_hat[inside], eps[inside]
            gain = float((a * b).sum() / (b * b).sum()) - 1
            rms = float((a - b).square().mean().sqrt())
            share = float(losses[inside].sum() / losses.sum())
            rows.append(
                (f"{start}..{end - 1}", float(inside.float().mean()), f"{gain:+.4f}", rms, share)
            )

        headers = ["t", "share of samples", "gain", "root mean square error", "share of the loss"]
        print_table(f"{run}, shown {spec.kind}", headers, rows)

    processes.close()


if __name__ == "__main__":
    sys.exit(main())
