"""A sweep: several jobs one after the other, and what became of them.

A job that fails does not keep the others from running; a signal ends them all. Hydra's own sweep
(`hydra/launcher=...`) is left to Hydra.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tdq_exp.commands import cli
from tdq_exp.config import compose, naming
from tdq_exp.runtime.progress import console, print_table

FLAGS = ("-m", "--multirun")

Run = Callable[[Any, Sequence[str]], None]


@dataclass(frozen=True)
class SweptJob:
    """One job of a sweep, after it has ended.

    Args:
        overrides: of its command line.
        ending: how it ended; None if it was not begun.
        name: of its run, or None where its configuration can't be composed.
        seed: of its fit.
        distance: of its images, with its name, or None where there is no row.
    """

    overrides: Sequence[str]
    ending: cli.Ending | None
    name: str | None = None
    seed: int | None = None
    distance: str | None = None

    @property
    def state(self) -> str:
        """Return how far the job is, in words."""
        if self.ending is None:
            return "not begun"
        if self.ending.stopped:
            return "stopped"
        return "failed" if self.ending.code else "done"


def jobs_of(arguments: Sequence[str]) -> list[list[str]] | None:
    """Return the overrides of each job of a sweep, or None if the command is none of ours."""
    overrides = [argument for argument in arguments if argument not in FLAGS]
    if len(overrides) == len(arguments):
        return None

    # Hydra's own options, and its launchers on other machines.
    if any(o.startswith(("-", "hydra.", "hydra/", "+hydra", "~hydra")) for o in overrides):
        return None
    return compose.sweep(overrides)


def run(jobs: Sequence[Sequence[str]], run_job: Run) -> int:
    """Run every job, then print what became of them.

    Args:
        jobs: the overrides of each.
        run_job: runs one, called with its configuration and its overrides.

    Returns:
        The exit code: 1 if a job failed; of the signal, if one has ended the sweep.
    """
    ended: list[SweptJob] = []

    for number, overrides in enumerate(jobs, 1):
        if ended and ended[-1].ending is not None and ended[-1].ending.stopped:
            ended += [SweptJob(others, None) for others in jobs[number - 1 :]]
            break
        console.print(f"job {number} of {len(jobs)}: {shlex.join(overrides)}")
        ended.append(_run_one(overrides, run_job))

    _print_summary(ended)
    return _exit_code(ended)


def _run_one(overrides: Sequence[str], run_job: Run) -> SweptJob:
    """Run one job; whatever it raises is printed and noted."""
    composed: list[Any] = []

    def attempt() -> None:
        composed.append(compose.compose(overrides))
        try:
            run_job(composed[0], overrides)
        except Exception:
            if composed[0].traceback:
                traceback.print_exc()
            raise

    try:
        ending = cli.attempt(attempt)
    except Exception as error:  # a mistake of ours, or memory: the others may still succeed
        traceback.print_exc()
        ending = cli.Ending(cli.FAILED, f"error: {type(error).__name__}: {_first_line(error)}")

    if not composed:
        return SweptJob(overrides, ending)
    cfg = composed[0]
    return SweptJob(overrides, ending, naming.fit_name(cfg), cfg.seed, _distance(cfg, ending))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _distance(cfg: Any, ending: cli.Ending) -> str | None:
    """Return the first distance of a job's row, if it has one."""
    if ending.code or cfg.plan_only:
        return None

    from tdq_exp.experiment.row import read_rows  # what runs has imported torch before
    from tdq_exp.metrics import VALUES

    rows = read_rows(naming.run_folder(cfg) / naming.sample_name(cfg) / "metrics.json")
    asked = [row for row in rows if row["config"]["eval"]["label"] == cfg.eval.label]
    if not asked:
        return None

    metrics = asked[0]["metrics"]
    known = [f"{VALUES[key].label} {metrics[key]:.4g}" for key in metrics if key in VALUES]
    return known[0] if known else None


def _print_summary(ended: Sequence[SweptJob]) -> None:
    """Print a table of all jobs, then each failed one with its line and its overrides."""
    lines = [
        [job.name or shlex.join(job.overrides), job.seed, job.distance, job.state] for job in ended
    ]
    print_table("jobs of the sweep", ["name", "seed", "distance", "state"], lines)

    failed = [
        (job, job.ending) for job in ended if job.ending is not None and job.state == "failed"
    ]
    if not failed:
        return

    print(f"{len(failed)} of {len(ended)} jobs failed:", file=sys.stderr)
    for job, ending in failed:
        line = ending.line or f"exit code {ending.code}, its message stands above"
        print(f"  {shlex.join(job.overrides)}: {line.removeprefix('error: ')}", file=sys.stderr)


def _exit_code(ended: Sequence[SweptJob]) -> int:
    endings = [job.ending for job in ended if job.ending is not None]
    stopped = [ending.code for ending in endings if ending.stopped]
    if stopped:
        return stopped[0]
    return cli.FAILED if any(ending.code for ending in endings) else 0
