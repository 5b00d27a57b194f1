"""The network of a finished fit, read from its folder and compared with the fit's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.config.naming import FIT_RECORD, PACKED
from tdq_exp.experiment.build import Experiment
from tdq_exp.models.weights.fill import load_weights, state_hash
from tdq_exp.quant.convert import bake
from tdq_exp.runtime import files, tensor_files
from tdq_exp.runtime.stage import read_record


def read_fit(folder: Path, must_be_sealed: bool = False) -> dict[str, Any] | None:
    """Return the record of the fit in a folder, or None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / FIT_RECORD
    found = read_record(path, ["config", "done"], must_be_sealed)
    if found is not None and found["done"] and "facts" not in found:
        raise files.damaged(path, "it has no facts")

    for key in ("config", "facts"):
        if found is not None and not isinstance(found.get(key, {}), dict):
            raise files.damaged(path, f"its {key} is {found[key]!r:.40}")
    return found


def finished_net(
    job: Experiment, fit: str, device: torch.device, checkpoint: Path | None = None
) -> nn.Module:
    """Return the network of a finished fit, or of one of its checkpoints, baked.

    Where the network itself is gone and a packed one lies beside it, the packed one is taken: it
    has the same bits.

    Args:
        job: the experiment; its folder is read.
        fit: fingerprint of the fit.
        device: where the network is wanted.
        checkpoint: file of a checkpoint; None for the last network.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, damaged, or not of this fit.
    """
    if checkpoint is not None:
        try:
            found = tensor_files.read_tensors(checkpoint)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{str(error).partition(';')[0]}; put it back, or remove {job.folder} to fit again"
            ) from error
        tensor_files.require_of(checkpoint, found.metadata, fit)
        require_update(checkpoint, found.metadata)
        net = job.fit.skeleton(job.model, job.recipe)
        load_weights(net, str(checkpoint))
        return bake(net, inplace=True).to(device)

    require_file(job)
    file = job.fit.network_file(job.folder)
    if not file.exists():
        return packed_net(job, job.folder / PACKED, fit).to(device)

    found = tensor_files.read_tensors(file)
    tensor_files.require_of(file, found.metadata, fit)
    net = job.fit.finished(job.model, job.recipe, job.folder, device)
    require_recorded(job.folder, file, net)
    return net


def require_update(file: Path, metadata: Mapping[str, str]) -> None:
    """Refuse the checkpoint of another update under this name.

    Raises:
        ValueError: naming both.
    """
    named = file.stem.rpartition("-")[2]
    stated = metadata.get("update", named)
    if stated.zfill(len(named)) != named:
        raise ValueError(
            f"{file}: holds the network of update {stated}; put the file of this update back, or"
            f" remove {file.parent} to fit again"
        )


def network_is_here(job: Experiment) -> bool:
    """Return whether a fit's network lies in its folder, packed or not."""
    return job.fit.network_file(job.folder).exists() or (job.folder / PACKED).exists()


def require_file(job: Experiment) -> None:
    """Refuse a finished fit whose network is not here, neither as it was baked nor packed.

    Raises:
        FileNotFoundError: naming the file.
    """
    if not network_is_here(job):
        file = job.fit.network_file(job.folder)
        raise FileNotFoundError(
            f"{file}: is not here, and no {PACKED} either; remove {job.folder / FIT_RECORD}"
            " and run the command again to fit anew"
        )


def packed_net(job: Experiment, path: Path, fit: str | None = None) -> nn.Module:
    """Return the network of a packed file, on the CPU.

    Args:
        job: the experiment that the file is of.
        path: the file.
        fit: fingerprint that it must be of, if that is known.

    Raises:
        ValueError: if the file is damaged, of another fit, or does not fit the experiment.
    """
    from tdq_exp.deploy import packed

    state, _, made_by, _ = packed.load(path)
    if fit is not None:
        tensor_files.require_of(path, {"fit": made_by}, fit)

    net = bake(job.fit.skeleton(job.model, job.recipe), inplace=True)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: does not fit its own configuration ({str(error).splitlines()[1].strip()})"
        ) from error
    return net


def require_recorded(folder: Path, file: Path, net: nn.Module) -> None:
    """Refuse a network that is not the one whose hash the record of the fit states.

    Raises:
        ValueError: naming both hashes. Records of earlier versions state none.
    """
    record = read_fit(folder)
    stated = record["facts"].get("network") if record is not None and record["done"] else None
    if stated is not None and state_hash(net.state_dict()) != stated:
        raise ValueError(
            f"{file}: is not the network of {folder / FIT_RECORD}, which states {stated}"
        )
