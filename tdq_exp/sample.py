"""Draw images from a finished run or a packed network, without training or measuring anything.

python -m tdq_exp.sample results/runs/digits_w4a4_lsq_tdq/seed0 --images 64 --seed 1 --out samples
python -m tdq_exp.sample digits_w4a4.safetensors --engine integer
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp import figures, fitting, record, sampling
from tdq_exp import job as jobs
from tdq_exp.data.store import ImageStore
from tdq_exp.processes import Processes
from tdq_exp.progress import console
from tdq_exp.quant.convert import bake


def load(run: str | Path) -> tuple[jobs.Job, nn.Module]:
    """The job and the network of a finished run, or of a packed file. See `tdq_exp.load`."""
    folder = Path(run).expanduser()
    if folder.suffix == ".safetensors":
        return _packed(folder)
    found = record.read(folder / "fit.json")
    if found is None or not found["done"]:
        state = "is not finished: run its command again" if found else "holds no run (there is no fit.json)"
        raise FileNotFoundError(f"{folder} {state}")
    job = jobs.rebuild(found["config"])
    job = dataclasses.replace(job, folder=folder)
    _check_parts(job.subject.parts(), found["parts"], folder)
    if job.fit.kind != "none":
        return job, fitting.finished_net(job, torch.device("cpu"))
    assert job.weights is not None
    net = job.model.build()
    if job.model.load(net, job.weights, job.ema) != found["facts"]["weights"]:
        raise ValueError(f"{job.weights}: is not the checkpoint of {folder}")
    return job, net.eval()


def _check_parts(now: Mapping[str, str], then: Mapping[str, Any], where: Path) -> None:
    for part, value in now.items():
        if then.get(part) != value:
            raise ValueError(f"model.{part}: is not the one of {where} ({value}, wanted {then.get(part)})")


def _packed(path: Path) -> tuple[jobs.Job, nn.Module]:
    from tdq_exp.deploy import packed

    state, config, _, parts = packed.load(path)
    job = jobs.rebuild(config)
    _check_parts(job.model.parts() if parts else {}, parts, path)
    assert job.recipe is not None
    net = bake(fitting.skeleton(job, job.recipe), inplace=True)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit its own configuration ({str(error).splitlines()[1].strip()})"
        ) from error
    return job, net


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
    if job.fit.part != "network":
        raise ValueError(f"{options.run}: is the model's {job.fit.part}; images are drawn from its network")
    sampler = job.sampler if options.steps is None else dataclasses.replace(job.sampler, steps=options.steps)
    size = job.model.image_size
    processes = Processes(cpu=options.cpu)
    net, _ = sampling.engine(
        net, job.model, options.engine, batch=options.batch, min_speedup=1.0, folder=options.out, processes=processes
    )
    store = ImageStore(options.out / "images", options.images, options.batch, (size, size, job.model.channels))
    sampling.sample_set(net, job.model, sampler, store, seed=options.seed, processes=processes)
    sampling.write_pngs(store.read(), options.out)
    figures.sample_grid({f"{job.name}, seed {options.seed}": store.read()}, options.out / "grid.png")
    processes.close()
    console.print(f"{options.images} images in {options.out}, side by side in {options.out / 'grid.png'}")


if __name__ == "__main__":
    main()
