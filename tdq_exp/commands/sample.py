"""Draw images from a finished run or a packed network, without training or measuring anything.

python -m tdq_exp sample results/runs/digits_w4a4_lsq_tdq/seed0 --images 64 --seed 1 --out samples
python -m tdq_exp sample results/runs/digits_w4a4_lsq_tdq/seed0/ddim20_n1000     as that set
python -m tdq_exp sample digits_w4a4.safetensors --engine integer
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from tdq_exp.commands import cli
from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.config.setting import SEED, require
from tdq_exp.data.arrays import ImageStore
from tdq_exp.experiment import sample_stage
from tdq_exp.experiment.build import Experiment, rebuild
from tdq_exp.experiment.engines import ImageSet, engine
from tdq_exp.experiment.finished_run import load
from tdq_exp.experiment.options import MOST_BATCH, MOST_IMAGES
from tdq_exp.experiment.row import read_rows
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime import figures, files
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console

SAMPLES = "samples.json"  # record of a set
LINES = 16  # of the picture that shows the images side by side, at most


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.exit_code(draw, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "python -m tdq_exp sample")

    # What is sampled.
    parser.add_argument(
        "run", type=Path, help="folder of a finished run or sampled set, or a packed network file"
    )

    parser.add_argument("--images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument(
        "--steps",
        type=int,
        help="sampling steps (default: those of the set, or of the run's first one)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of the starting noise (default: the run's; with its steps and batch and the fake"
        " engine, this reproduces the run's images)",
    )

    # How, and where it goes.
    parser.add_argument(
        "--batch", type=int, help="images that are computed together (default: the run's)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        help="folder for PNGs and grid (default: samples)",
    )
    parser.add_argument(
        "--engine", default="fake", help="fake (simulated quantization, the default) or integer"
    )

    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")

    return parser


@products("float32")  # as a run's own images were computed
def draw(options: argparse.Namespace) -> None:
    """Sample as the options say.

    Raises:
        ValueError, OSError: for options out of range, or a folder that is in use.
    """
    options.out = options.out.expanduser()
    _require_ranges(options)

    # 1. What can be refused before anything is loaded.
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"--out={options.out}: is not empty; name another folder")

    if options.engine not in ("fake", "integer"):
        raise ValueError(f"--engine={options.engine}: choose fake or integer")

    # 2. The network, and how it is sampled.
    job, net = _loaded(options.run.expanduser())
    if not job.fit.options.fits_network:
        raise ValueError(
            f"{options.run}: is the model's {job.fit.options.part}; images are drawn from"
            " its network"
        )

    sampler = (
        job.sampler
        if options.steps is None
        else dataclasses.replace(job.sampler, steps=options.steps)
    )

    sampler.check(job.model.schedule)

    seed = job.sampling.seed if options.seed is None else options.seed
    batch = options.batch or job.sampling.batch

    # 3. The images, as an array, as PNGs and side by side.
    processes = Processes(cpu=options.cpu)
    try:
        size, channels = job.model.image_size, job.model.channels
        store = ImageStore(options.out / "images", options.images, batch, (size, size, channels))
        images = ImageSet(options.out, store)
        net, _ = engine(net, job.model, options.engine, images, processes)

        sample_stage.sample_set(
            Denoiser(net, job.model),
            sampler,
            store,
            seed=seed,
            processes=processes,
            truncate=job.sampling.truncate,
        )

        sample_stage.write_pngs(store.read(), options.out)
        shown = figures.sample_grid(
            {f"{job.name}, seed {seed}": store.read()}, options.out / "grid.png", lines=LINES
        )
    finally:
        processes.close()

    console.print(
        f"{options.images} images in {options.out}; {_shown(shown, options.images)} side by side in"
        f" {options.out / 'grid.png'}",
    )


def _loaded(run: Path) -> tuple[Experiment, nn.Module]:
    """Return the experiment and the network of a run; sampled as a set of it, if that is named.

    The set of a run that chose among several checkpoints lies a folder deeper, one for each.

    Raises:
        ValueError, OSError: if there is no finished run, or the set has no row.
    """
    if not any((*run.glob(SAMPLES), *run.glob(f"update*/{SAMPLES}"))):
        return load(run)

    is_of_run = (run.parent / FIT_RECORD).is_file()
    folder = run.parent if is_of_run else run.parent.parent
    rows = read_rows(run / "metrics.json")
    if not rows:
        raise ValueError(f"{run}: has no row, which says how it was sampled; name {folder}")
    job, net = load(folder, rows[0]["update"])
    of_set = rebuild(rows[0]["config"], run / "metrics.json")
    return dataclasses.replace(job, sampler=of_set.sampler, sampling=of_set.sampling), net


def _shown(shown: int, images: int) -> str:
    """Return how many of all images a picture shows, in words."""
    return "all" if shown == images else f"the first {shown}"


def _require_ranges(options: argparse.Namespace) -> None:
    """Refuse numbers that are probably typos, and an output that can't be a folder.

    Raises:
        ValueError, OSError: naming the option.
    """
    for name, most in (("images", MOST_IMAGES), ("batch", MOST_BATCH)):
        if (value := getattr(options, name)) is not None:
            require(f"--{name}", value, int, low=1, most=most)
    if options.seed is not None:
        require("--seed", options.seed, int, low=0, high=SEED)
    files.require_folder(options.out, "--out")
