"""Loading the network of a finished run, or of a packed file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment.inputs import require_network
from tdq_exp.experiment.own_checks import path_of
from tdq_exp.experiment.row import read_rows
from tdq_exp.experiment.stored_network import finished_net, packed_net, read_fit, require_file
from tdq_exp.fit.checkpoint import best_file


def load(run: str | Path, update: int | None = None) -> tuple[jobs.Experiment, nn.Module]:
    """Return the job and the network of a finished run, or of a packed file. See `tdq_exp.load`.

    Args:
        run: the folder or the file.
        update: of the checkpoint, of a run that chose among several; None if all of its sets chose
            the same one.
    """
    folder = path_of(run, "run")
    if folder.suffix == ".safetensors":
        return _packed(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder}: is a file; wanted the folder of a run, or a packed network, *.safetensors"
        )

    found = read_fit(folder)
    if found is None or found["done"] is not True:
        state = (
            "is not finished: run its command again"
            if found
            else f"holds no run (there is no fit.json){_seeds_below(folder)}"
        )
        raise FileNotFoundError(f"{folder} {state}")

    for key in ("config", "parts", "facts"):
        if not isinstance(found.get(key), dict):
            raise ValueError(f"{folder / FIT_RECORD}: is no record of a fit (it has no {key})")

    # Built again from the configuration that was recorded.
    job = jobs.rebuild(found["config"], folder / FIT_RECORD)
    job = dataclasses.replace(job, folder=folder)
    if not job.fit.options.loads_only:
        require_file(job)
    require_network(job)
    _check_parts(job.trained.parts(), found["parts"], folder)

    if not job.fit.options.loads_only:
        checkpoint = None
        if job.fit.options.chooses_checkpoint:
            if update is None:
                checkpoint = _measured_checkpoint(folder)
            else:
                checkpoint = best_file(folder, update)
        return job, finished_net(job, found["fingerprint"], torch.device("cpu"), checkpoint)

    # A float model: its weights are those of a file of its own.
    net = job.model.build()
    if job.weights.load(job.model, net) != found["facts"]["weights"]:
        raise ValueError(f"{job.weights.path}: is not the checkpoint of {folder}")
    return job, net.eval()


def _seeds_below(folder: Path) -> str:
    """Return the runs of a folder that holds one for each training seed, in words."""
    runs = sorted(file.parent.name for file in folder.glob(f"seed*/{FIT_RECORD}"))
    return f"; name one below it: {', '.join(runs)}" if runs else ""


def _measured_checkpoint(folder: Path) -> Path:
    """Return the file of the checkpoint that was measured, for a run that chose among several.

    Raises:
        ValueError: if nothing was measured, or several sets chose different ones.
    """
    rows = [row for file in folder.glob("*/metrics.json") for row in read_rows(file)]
    updates = sorted({int(row["update"]) for row in rows if row.get("update") is not None})
    if len(updates) != 1:
        found = f"its sets chose {updates}" if updates else "none is measured yet"
        raise ValueError(
            f"{folder}: is the best of several checkpoints (fit.report=best_of_5), and {found};"
            + ("" if updates else " run its command again")
        )
    return best_file(folder, updates[0])


def _check_parts(now: Mapping[str, str], then: Mapping[str, Any], where: Path) -> None:
    for part, value in now.items():
        if then.get(part) != value:
            raise ValueError(
                f"model.{part}: is not the one of {where} ({value}, wanted {then.get(part)})"
            )


def _packed(path: Path) -> tuple[jobs.Experiment, nn.Module]:
    from tdq_exp.deploy import packed

    _, config, _, parts = packed.load(path)
    job = jobs.rebuild(config, path)
    require_network(job)
    _check_parts(job.model.parts() if parts else {}, parts, path)
    return job, packed_net(job, path)
