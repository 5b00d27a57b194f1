"""Run the cells of a table that have no row: their plan first, then one command for each.

A cell that fails does not keep the others from running. Every command resumes where it was stopped,
so the same holds for all of them together.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdq_exp.config.compose import compose
from tdq_exp.report.cells import Cell
from tdq_exp.runtime.command import call
from tdq_exp.runtime.progress import console, print_table

if TYPE_CHECKING:
    from tdq_exp.experiment import build as jobs


def run(cells: Sequence[Cell], go: bool = False) -> list[str]:
    """Print the plan, run every cell without a row in the order of the table, and say which failed.

    A signal ends all of it.

    Args:
        cells: of a table, with the rows that were found.
        go: start the paper's scale although there is no GPU.

    Returns:
        The names of the cells that failed.

    Raises:
        ValueError, OSError: if a cell's config can't be built, or the paper's scale is asked for
            without a GPU; before anything is started.
    """
    _warn_of_stale(cells)

    missing = [cell for cell in cells if not cell.done]
    if not missing:
        console.print("every cell has a row: nothing to run")
        return []

    from tdq_exp.runtime import launch  # it imports torch

    if show_plan(missing) and not launch.gpus() and not go:
        raise ValueError(
            "this is the paper's scale and there is no GPU: take SCALE=small (--scale small),"
            " or insist with --go"
        )

    # One process a cell: a failure stops that cell alone, and is told at the end.
    codes: list[int] = []
    for number, (cell, name) in enumerate(zip(missing, names_of(missing), strict=True), 1):
        command = ["-m", "tdq_exp.run", *cell.overrides, *(["go=true"] if go else [])]
        console.print(f"cell {number} of {len(missing)}: python {shlex.join(command)}")

        codes.append(call([sys.executable, *command]))
        if codes[-1]:
            console.print(
                f"cell {number} of {len(missing)}: {name} failed (exit code {codes[-1]})",
            )

    return show_summary(missing, codes)


def share_of(cells: Sequence[Cell], number: int, count: int) -> list[Cell]:
    """Return the cells of every `count`-th run, from the `number`-th on, counted from 1.

    Cells of one run stay together: they work in one folder. The shares depend on the table alone,
    and not on what is done by now.
    """
    fits = [(cell.run, cell.config["seed"]) for cell in cells]
    mine = set(list(dict.fromkeys(fits))[number - 1 :: count])
    return [cell for cell, fit in zip(cells, fits, strict=True) if fit in mine]


def names_of(cells: Sequence[Cell]) -> list[str]:
    """Return a name for each cell: its run, and the sampled set where a run has several cells."""
    counts = Counter(cell.name for cell in cells)
    return [cell.key if counts[cell.name] > 1 else cell.name for cell in cells]


def show_summary(cells: Sequence[Cell], codes: Sequence[int]) -> list[str]:
    """Print what became of each cell that was run, and the commands of those that failed.

    Args:
        cells: that were run.
        codes: the exit code of each.

    Returns:
        The names of those that failed.
    """
    ended = list(zip(names_of(cells), cells, codes, strict=True))
    lines = [[name, "failed" if code else "done", code] for name, _, code in ended]
    print_table("cells that were run", ["cell", "state", "exit code"], lines)

    failed = {name: cell for name, cell, code in ended if code}
    if failed:
        console.print(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}")

    for name, cell in failed.items():
        console.print(f"  {name} again, alone: {command_of(cell)}")
    return list(failed)


def show_missing(cells: Sequence[Cell]) -> None:
    """Print the cells without a row, each with the command that makes it; and stale ones."""
    _warn_of_stale(cells)
    missing = [cell for cell in cells if not cell.done]
    if not missing:
        return

    console.print(f"{len(missing)} of {len(cells)} rows are missing; to run them all, add --run:")
    for name, cell in zip(names_of(missing), missing, strict=True):
        console.print(f"  {name}: {command_of(cell)}")


def command_of(cell: Cell) -> str:
    """Return the command that makes a cell's row."""
    return f"python {shlex.join(['-m', 'tdq_exp.run', *cell.overrides])}"


def show_plan(cells: Sequence[Cell]) -> bool:
    """Print what each cell and all of them would cost.

    Returns:
        Whether one is of the paper's scale and no rehearsal.

    Raises:
        ValueError, OSError: if a config can't be built.
    """
    from tdq_exp.experiment import cost as costs

    jobs_of_cells = [_job(cell) for cell in cells]

    # Cells of one shape cost the same; a forward pass is measured once for each network.
    # A fit of which several sets are sampled is made by the first of them.
    known: dict[str, costs.Cost] = {}
    fits = set()
    per_cell = []
    for job in jobs_of_cells:
        shape = _shape(job)
        if shape not in known:
            known[shape] = costs.estimate(job)
        cost = known[shape]
        per_cell.append(cost.without_fit() if job.folder in fits else cost)
        fits.add(job.folder)

    images = [cell.config["sampler"]["images"] for cell in cells]
    lines: list[list[Any]] = [
        [name, count, *_costs(cost.seconds, cost.disk_bytes)]
        for name, count, cost in zip(names_of(cells), images, per_cell, strict=True)
    ]
    total = _costs(
        sum(cost.seconds for cost in per_cell), sum(cost.disk_bytes for cost in per_cell)
    )
    lines.append([f"all {len(cells)}", sum(images), *total])
    print_table("cells to run, and about what they cost", ["cell", "images", "time", "disk"], lines)

    networks = len({costs.network_key(job) for job in jobs_of_cells})
    console.print(f"times: from one measured forward pass of each network ({networks})")

    cards = [cost.card for cost in per_cell if cost.card is not None]
    if len(cards) == len(per_cell):
        there = costs.duration(sum(cost.seconds for cost in cards))
        stages = [gb or 0.0 for cost in cards for gb in (cost.memory_gb, cost.sample_gb)]
        most = max(stages, default=0.0)
        memory = f", at most {most:.0f} GB of its memory" if most else ""
        basis = "" if all(c.measured for c in cards) else "; at least, from counted multiplications"
        console.print(f"on one {cards[0].card}: about {there}{memory}{basis}")

    encode = max((cost.encode_seconds for cost in per_cell), default=0.0)
    if encode:
        duration = costs.duration(1000 * encode)
        console.print(
            f"on top, once for all cells: encoding training images, about {duration} for 1,000"
        )

    return any(
        job.config["protocol"]["scale"] == "paper" and not job.machine.smoke
        for job in jobs_of_cells
    )


def _warn_of_stale(cells: Sequence[Cell]) -> None:
    stale = [cell.name for cell in cells if cell.done and cell.changes]
    if stale:
        console.print(
            f"stale, not run again: {', '.join(stale)}; a run refuses to replace one of another"
            " configuration under its name, so move its folder away first",
        )


def _job(cell: Cell) -> jobs.Experiment:
    from tdq_exp.experiment import build as jobs  # it imports torch

    try:
        return jobs.build(compose(cell.overrides))
    except ValueError as error:
        raise ValueError(
            f"{cell.name}: {error}; --column runs one column, with overrides of its own"
        ) from error


def _shape(job: jobs.Experiment) -> str:
    """Return what the cost of a job depends on, as text."""
    from tdq_exp.experiment import cost as costs
    from tdq_exp.experiment.card import form_of

    fit = [job.part("model", "fit"), job.recipe is not None, job.fit.options.report]
    sampling = [job.sampling.images, job.sampling.steps, form_of(job)]
    return json.dumps([*fit, *sampling, costs.stages_done(job)], sort_keys=True)


def _costs(seconds: float, disk: int) -> list[str]:
    from tdq_exp.experiment import cost as costs

    return [costs.duration(seconds), f"{disk / 1e9:.2f} GB"]
