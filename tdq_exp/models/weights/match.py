"""Matching what a file holds with the weights that a network wants."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tdq_exp.models.weights.inert_pickle import CheckpointError


def match(
    source: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the found weights in the shapes, type and places of the wanted ones.

    Raises:
        CheckpointError: listing all differences at once.
    """
    fitted: dict[str, torch.Tensor] = {}
    misshapen, mistyped = [], []
    for name in found.keys() & wanted.keys():
        tensor, target = found[name], wanted[name]

        if target.ndim == 2 and tensor.shape in ((*target.shape, 1), (*target.shape, 1, 1)):
            tensor = tensor.reshape(target.shape)  # a convolution of size 1 is a linear layer
        if tensor.shape != target.shape:
            misshapen.append(f"{name} {list(tensor.shape)}, wanted {list(target.shape)}")
        elif target.is_floating_point() != tensor.is_floating_point():
            mistyped.append(f"{name} {tensor.dtype}, wanted {target.dtype}")
        fitted[name] = tensor.to(target)
    faulty = [name for name, tensor in fitted.items() if not bool(tensor.isfinite().all())]

    # All differences at once: they tell together what the file is of.
    faults = {
        "missing": [name for name in wanted if name not in found],
        "left over": [name for name in found if name not in wanted],
        "misshapen": sorted(misshapen),
        "mistyped": sorted(mistyped),
    }

    if any(faults.values()):
        parts = [f"{len(keys)} {fault} ({_first(keys)})" for fault, keys in faults.items() if keys]
        raise CheckpointError(f"{source}: its keys are not the network's: {'; '.join(parts)}")

    if faulty:
        raise CheckpointError(
            f"{source}: {len(faulty)} of its weights hold NaN or infinity ({_first(faulty)});"
            " the training that wrote it failed: take an earlier checkpoint"
        )
    return fitted


def _first(keys: list[str], count: int = 3) -> str:
    return "; ".join(keys[:count]) + ("; ..." if len(keys) > count else "")
