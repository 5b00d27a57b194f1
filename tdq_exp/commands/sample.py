"""Draw images from a finished run or a packed network, without training or measuring anything.

python -m tdq_exp sample results/runs/digits_w4a4_lsq_tdq/seed0 --images 64 --seed 1 --out samples
python -m tdq_exp sample digits_w4a4.safetensors --engine integer
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tdq_exp.data.arrays import ImageStore
from tdq_exp.experiment import sample_stage
from tdq_exp.experiment.load import load
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime import figures
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console


def main() -> None:
    """The command; `--help` lists its options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="folder of a finished run, results/runs/<name>/seed<k>, or a packed network"
    )
    parser.add_argument("--images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: as the run was measured)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: 0, the measured images)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for PNGs and grid (default: samples)")
    parser.add_argument("--engine", default="fake", help="fake (simulated quantization, the default) or integer")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    options = parser.parse_args()
    try:
        draw(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def draw(options: argparse.Namespace) -> None:
    """Samples as the options say; refuses a folder that holds something else.

    Raises:
        ValueError, OSError: for options out of range, or a folder that is in use.
    """
    for name in ("images", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)}: must be at least 1")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"--out={options.out}: is not empty; name another folder")
    if options.engine not in ("fake", "integer"):
        raise ValueError(f"--engine={options.engine}: choose fake or integer")
    job, net = load(options.run)
    if not job.fit.options.fits_network:
        raise ValueError(f"{options.run}: is the model's {job.fit.options.part}; images are drawn from its network")
    sampler = job.sampler if options.steps is None else dataclasses.replace(job.sampler, steps=options.steps)
    size = job.model.image_size
    processes = Processes(cpu=options.cpu)
    net, _ = sample_stage.engine(
        net, job.model, options.engine, batch=options.batch, min_speedup=1.0, folder=options.out, processes=processes
    )
    store = ImageStore(options.out / "images", options.images, options.batch, (size, size, job.model.channels))
    sample_stage.sample_set(Denoiser(net, job.model), sampler, store, seed=options.seed, processes=processes)
    sample_stage.write_pngs(store.read(), options.out)
    figures.sample_grid({f"{job.name}, seed {options.seed}": store.read()}, options.out / "grid.png")
    processes.close()
    console.print(f"{options.images} images in {options.out}, side by side in {options.out / 'grid.png'}")
