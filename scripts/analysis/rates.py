"""Compare rates of step sizes and zero points by validation loss, for all methods alike -> rates.json, .md.

    python scripts/analysis/rates.py model=ddim_small plan=release bits=w4a4 --updates 500
    python scripts/analysis/rates.py ... --methods lsq lsq_tdq     of these methods alone
    python scripts/analysis/rates.py ... --rates lr_step_size --factors 10 30 --name rates_groups
                                                                   far from the protocol's, of one rate

Each method is trained with the protocol's rates, then with one of them multiplied by a factor, the
others as they are. No image is sampled: rates are compared by the loss that training
lowers, on images that it does not see, never by the distance that tables report. Every fit lies
under `--work` and is found there again, so that the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdq_exp.commands import cli
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.experiment.fit_stage import run_fit
from tdq_exp.report import pages
from tdq_exp.report.cells import in_footer
from tdq_exp.runtime import lock
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.tracking import Tracker

METHODS = {
    "lsq": ("LSQ", ["method=lsq", "tdq=none"]),
    "lsq_tdq": ("LSQ + TDQ", ["method=lsq", "tdq=temporal"]),
    "pact": ("PACT", ["method=pact", "tdq=none"]),
    "nipq": ("NIPQ", ["method=nipq", "tdq=none"]),
    "s10": ("S10", ["method=lsq", "tdq=s10"]),
    "s100": ("S100", ["method=lsq", "tdq=s100"]),
    "s1000": ("S1000", ["method=lsq", "tdq=s1000"]),
}
TABLE1 = ["lsq", "lsq_tdq", "pact", "nipq"]
SET_HERE = ("label", "out", "method", "tdq", "fit.updates", "tracker")
RATES = {"lr_step_size": "step sizes", "lr_zero_point": "zero points"}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="+", help="the experiment, without its method")
    parser.add_argument("--updates", type=int, default=500, help="of each fit")
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 3.0], help="of a rate")
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=TABLE1)
    parser.add_argument("--work", type=Path, default=Path("results/rates"), help="of the fits")
    parser.add_argument("--out", type=Path, default=Path("results/analysis"))
    parser.add_argument("--name", default="rates", help="of the page")
    return cli.exit_code(search, parser.parse_args())


def search(options: argparse.Namespace) -> None:
    """Fit what is missing, and write the page of all fits that are done.

    Raises:
        ValueError: if the experiment can't be built, or a factor is none.
    """
    for factor in options.factors:
        if not (math.isfinite(factor) and factor > 0 and factor != 1):
            raise ValueError(f"--factors {factor:g}: must be a number above 0 other than 1")
    if len({_name(factor) for factor in options.factors}) < len(options.factors):
        raise ValueError("--factors: two of them have the same three digits")
    for override in options.overrides:
        if override.lstrip("+").partition("=")[0] in SET_HERE:
            raise ValueError(f"{override}: the search sets it itself")

    losses: dict[str, dict[str, float]] = {}
    points: dict[str, dict[str, float]] = {}

    for method in options.methods:
        title, choices = METHODS[method]
        shared = [*options.overrides, *choices, f"fit.updates={options.updates}"]
        protocol = compose(shared).fit
        rates = {name: float(protocol[name]) for name in RATES}
        points = _points(rates, options.rates, options.factors)

        of_method = losses.setdefault(title, {})
        for point, rates in points.items():
            values = [f"fit.{name}={rate:.4g}" for name, rate in rates.items()]
            places = [f"label=rates_{point}", f"out={options.work}", "tracker=none"]
            job = jobs.build(compose([*shared, *values, *places]))
            of_method[point] = _validation_loss(job)

    _write(options, losses, points)


def _points(
    rates: Mapping[str, float], changed: Sequence[str], factors: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return point -> rates by name: the protocol's, and those with one of them changed."""
    points = {"protocol": dict(rates)}
    for name in changed:
        for factor in factors:
            points[f"{name}_{_name(factor)}"] = {**rates, name: rates[name] * factor}
    return points


def _name(factor: float) -> str:
    """Return a factor as it is part of a label, which holds letters and digits: 0.333, 1000."""
    return f"{float(f'{factor:.3g}'):.10f}".rstrip("0").rstrip(".")


def _validation_loss(job: jobs.Experiment) -> float:
    """Return the validation loss at the end of a fit, which is made if it is not there."""
    launcher = job.machine.launcher
    processes = Processes(cpu=launcher.cpu, threads=launcher.threads)
    tracker = Tracker("none", job.machine.tracker.project, job.name, job.folder, job.config)

    try:
        with lock.held(job.folder), products("float32"):
            fit = run_fit(job, pipeline.load_data(job, processes), processes, tracker)
    finally:
        tracker.close()
        processes.close()
    return float(fit.facts["validation_loss"])


def _write(
    options: argparse.Namespace,
    losses: Mapping[str, Mapping[str, float]],
    points: Mapping[str, Mapping[str, float]],
) -> None:
    """Write and print the page.

    Args:
        losses: method -> point -> validation loss.
        points: point -> rates by name.
    """
    named = in_footer(options.overrides)  # not where data lie
    factors = ", ".join(f"{factor:.3g}" for factor in options.factors)
    head = [
        "# Rates of step sizes and zero points",
        "",
        f"Validation loss after {options.updates} updates, `{' '.join(named)}`. One rate at a"
        f" time multiplied by {factors}; weights and TDQ's generators keep their rate."
        " Change: mean over the methods of the loss divided by the one with the protocol's rates, less 1.",
        "",
        f"| {' | '.join([*RATES.values(), *losses, 'change'])} |",
        "|" + "---:|" * (len(RATES) + len(losses) + 1),
    ]
    lines = []
    for point, rates in points.items():
        ratios = [of_method[point] / of_method["protocol"] for of_method in losses.values()]
        cells = [
            *(f"{rates[name]:.4g}" for name in RATES),
            *(f"{of_method[point]:.5f}" for of_method in losses.values()),
            f"{100 * (statistics.fmean(ratios) - 1):+.2f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")

    measured = {"losses": losses, "points": points}
    about = pages.about(overrides=named, updates=options.updates, factors=options.factors)
    pages.report(options.out / options.name, measured, about, [*head, *lines])


if __name__ == "__main__":
    sys.exit(main())
