"""The command of a table: which cells it asks for, their cost, their runs, and the table in the end.

Each cell is a command of its own; one that fails does not keep the others from running. Every command resumes where it
was stopped, so the same holds for all of them together.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from tdq_exp.config import assets, naming, schema
from tdq_exp.config.compose import compose
from tdq_exp.report import cells as tables
from tdq_exp.report import charts
from tdq_exp.report import columns as tabulate
from tdq_exp.report import render as rendering
from tdq_exp.report.cells import Cell, Manifest
from tdq_exp.runtime.progress import console, print_table

PATIENCE = 30.0  # seconds that a stopped command gets to end its processes
OWN = {
    "out": "use --out",
    "go": "use --go",
    "experiment": "the table names its experiments",
    "sampler.seed": "the table names its sampler seeds",
    "plan_only": "--run prints the plan before it starts",
}


EXAMPLES = """
  python -m tdq_exp table table1 --scale digits          render from the rows that are there
  python -m tdq_exp table table1 --scale digits --run    first run every cell that has no row
  python -m tdq_exp table table1 --scale small --run data.source.path=~/cifar10
  python -m tdq_exp table table1 --scale small --run --column ldm    only the cells of one column
To go on after an interruption, run the same command again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a cell failed, 2 for a user's mistake or rows that do not compare."""
    options = parse(arguments)
    try:
        return make(options)
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tdq_exp table", description="Fills a table of the paper from the rows of finished runs.",
        epilog=f"examples:{EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("table", help="a file of configs/table: table1, table2")
    parser.add_argument("overrides", nargs="*", help="overrides of every cell's command, as data.source.path=PATH")
    parser.add_argument("--scale", default="paper", help="paper, small or digits (default: paper)")
    parser.add_argument(
        "--run", action="store_true", help="print the plan, run the cells that have no row, then render"
    )
    parser.add_argument(
        "--column", help="run the cells of this column alone: ddim, ldm (default: all that the scale has)"
    )
    parser.add_argument("--go", action="store_true", help="run the paper's scale although there is no GPU")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of runs and tables (default: results)"
    )
    return parser.parse_intermixed_args(arguments)


def make(options: argparse.Namespace) -> int:
    """Runs what is missing, if asked to, and writes the table."""
    manifest = tables.read_manifest(options.table)
    out = options.out.expanduser()
    cells = [tables.find(cell) for cell in ask(manifest, options.scale, out, options.overrides, options.column)]
    failed: list[str] = []
    if options.run:
        failed = run([cell for cell in cells if options.column in (None, cell.column)], options.go)
        cells = [tables.find(cell) for cell in cells]
    for cell in cells:
        if cell.changes:
            console.print(f"stale {cell.name}: {'; '.join(cell.changes)}", markup=False)
    table = tabulate.tabulate(manifest, options.scale, cells, said(options.overrides))
    paths = rendering.write(table, out / "tables" / f"{manifest.name}-{options.scale}")
    if manifest.plot_weight_bits is not None:
        paths += draw(manifest, options.scale, cells, out / "figures")
    lines = [texts for group in table.groups for texts in group]
    print_table(table.title, [" ".join(header).strip() for header in table.headers], lines)
    for path in paths:
        console.print(f"{'table' if path.parent.name == 'tables' else 'figure'}    {path}", markup=False)
    return 1 if failed else 0


def draw(manifest: Manifest, scale: str, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """The table's distances over the activations' bits, if there is anything to draw; a panel for each column."""

    panels = []
    for column, model in manifest.models(scale).items():
        own = [cell for cell in cells if cell.column == column]
        methods, floor = tabulate.over_bits(manifest, own)
        if methods:
            title = f"{model}, weights at {manifest.plot_weight_bits} bits"
            panels.append(charts.Panel(title, tabulate.distance_name(own), methods, floor))
    if not panels:
        return []
    path = folder / f"{manifest.name}-{scale}.png"
    charts.distance_over_bits(panels, path, manifest.title)
    return [path]


def ask(
    manifest: Manifest, scale: str, out: Path, overrides: Sequence[str] = (), column: str | None = None
) -> list[Cell]:
    """The cells of a table, column by column, the float model's first, without their rows.

    Args:
        manifest: the table.
        scale: one of its scales.
        out: folder of results.
        overrides: of every cell's command, such as data.source.path=PATH.
        column: whose cells have them, if not all.

    Raises:
        ValueError: for a scale, a column or an override that does not exist, or an override that the table sets itself.
    """
    models = manifest.models(scale)
    if not models:
        scales = dict.fromkeys(scale for column in manifest.columns.values() for scale in column.scales)
        raise ValueError(f"--scale {scale}: {manifest.name} has {', '.join(scales)}")
    if column is not None and column not in models:
        raise ValueError(f"--column {column}: {manifest.name} at scale {scale} has {', '.join(models)}")
    for override in overrides:
        if _key(override) in OWN:
            raise ValueError(f"{override}: {OWN[_key(override)]}")
    tracker = [] if any(_key(o) == "tracker" for o in overrides) else ["tracker=none"]
    cells = []
    for (name, model), line in product(models.items(), (manifest.float_model, *manifest.lines)):
        quantized = line is not manifest.float_model
        experiment = f"{model}_{line.experiment}{manifest.columns[name].suffix if quantized else ''}"
        given = overrides if column in (None, name) else ()
        # The float model has no checkpoints to choose from: best_of_5 is for the quantized lines.
        extra = [o for o in given if quantized or _key(o) != "fit.report"]
        for seed in line.sampler_seeds:
            chosen = [f"+experiment={experiment}", *line.overrides, *([f"sampler.seed={seed}"] if seed else [])]
            command = (*chosen, f"out={_quoted(out)}", *tracker, *extra)
            cfg = compose(command)
            bare = compose(chosen) if said(extra) else cfg
            folder, sample = naming.run_folder(cfg), naming.sample_name(cfg)
            nets = {"weights": shipped_hash(cfg.model.weights), "autoencoder": shipped_hash(cfg.model.autoencoder)}
            known = {key: mark for key, mark in nets.items() if mark is not None}
            values = schema.plain(cfg)
            cells.append(Cell(name, line, experiment, command, values, folder, sample, bare.sampler.images, known))
    return cells


@lru_cache
def shipped_hash(weights: str | None) -> str | None:
    """Hash of a shipped net; None for any other, which may be large or far away."""
    if weights is None or not weights.startswith("shipped:"):
        return None
    from tdq_exp.models.weights.load import file_hash  # it imports torch

    return file_hash(assets.weights(weights))


def said(overrides: Iterable[str]) -> list[str]:
    """The overrides that a table's footer names: those that say more than where and how fast."""
    groups, keys = {"launcher", "tracker", "hydra"}, {"cache", "weights", "path", "export", "stop_after", "png"}
    split = [(o, _key(o).split(".")) for o in overrides]
    return [o for o, key in split if key[0] not in groups and key[-1] not in keys]


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _quoted(path: Path) -> str:
    """A path as the value of an override."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", r"\'") + "'"


def run(cells: Sequence[Cell], go: bool = False) -> list[str]:
    """Prints the plan, runs every cell without a row in the order of the table, and says which failed.

    Args:
        cells: of a table, with the rows that were found.
        go: start the paper's scale although there is no GPU.

    Returns:
        The names of the cells that failed.

    Raises:
        ValueError, OSError: if a cell's config can't be built, or the paper's scale is asked for without a GPU; before
            anything is started.
    """
    stale = [cell.name for cell in cells if cell.done and cell.changes]
    if stale:
        console.print(
            f"stale, not run again: {', '.join(stale)}; a run refuses to replace one of another configuration under its"
            " name, so move its folder away first",
            markup=False,
        )
    missing = [cell for cell in cells if not cell.done]
    if not missing:
        console.print("every cell has a row: nothing to run")
        return []
    from tdq_exp.runtime import launch  # it imports torch

    if show_plan(missing) and not launch.gpus() and not go:
        raise ValueError(
            "this is the paper's scale and there is no GPU: take SCALE=small (--scale small), or insist with --go"
        )
    failed = []
    for number, cell in enumerate(missing, 1):
        command = ["-m", "tdq_exp.run", *cell.overrides, *(["go=true"] if go else [])]
        console.print(f"cell {number} of {len(missing)}: python {shlex.join(command)}", markup=False)
        code = call([sys.executable, *command])
        if code:
            failed.append(cell.name)
            console.print(f"cell {number} of {len(missing)}: {cell.name} failed (exit code {code})", markup=False)
    if failed:
        console.print(f"{len(failed)} of {len(missing)} cells failed: {', '.join(failed)}", markup=False)
    return failed


def show_plan(cells: Sequence[Cell]) -> bool:
    """Prints what each cell and all of them would cost; says if one is of the paper's scale and no rehearsal.

    Raises:
        ValueError, OSError: if a config can't be built.
    """
    from tdq_exp.experiment import build as jobs
    from tdq_exp.experiment import cost as costs

    known: dict[str, costs.Cost] = {}
    lines: list[list[Any]] = []
    seconds, disk, paper = 0.0, 0, False
    for cell in cells:
        try:
            job = jobs.build(compose(cell.overrides))
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}; --column runs one column, with overrides of its own") from error
        # A measured forward pass of a large net is slow, and cells of one shape cost the same.
        shape = [job.part("model", "fit"), job.recipe is not None, job.fit.options.report, job.sampling.images]
        key = json.dumps([*shape, job.sampling.steps, costs.stages_done(job)], sort_keys=True)
        if key not in known:
            known[key] = costs.estimate(job)
        cost = known[key]
        lines.append([cell.name, cell.config["sampler"]["images"], *_costs(cost.seconds, cost.disk_bytes)])
        seconds, disk = seconds + cost.seconds, disk + cost.disk_bytes
        paper = paper or (job.config["protocol"]["scale"] == "paper" and not job.machine.smoke)
    total = [f"all {len(cells)}", sum(line[1] for line in lines), *_costs(seconds, disk)]
    print_table("cells to run, and about what they cost", ["cell", "images", "time", "disk"], [*lines, total])
    encode = max((cost.encode_seconds for cost in known.values()), default=0.0)
    if encode:
        console.print(
            f"on top, once for all cells: encoding training images, about {costs.duration(1000 * encode)} for 1,000"
        )
    return paper


def _costs(seconds: float, disk: int) -> list[str]:
    from tdq_exp.experiment import cost as costs

    return [costs.duration(seconds), f"{disk / 1e9:.2f} GB"]


def call(command: Sequence[str]) -> int:
    """Runs a command with this terminal's input and output; returns its exit code.

    A command is not left behind when this process is stopped: its own processes end before it does.
    """
    previous = signal.signal(signal.SIGTERM, _stop)
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):  # the terminal sends Ctrl-C to the command as well
            process.terminate()
        try:
            process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.terminate()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
