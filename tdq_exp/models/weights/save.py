"""Writing weights as safetensors, and the hash that names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tdq_exp.runtime import tensor_files
from tdq_exp.runtime.hashes import tensor_hash


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of a set of weights, the same in whatever file. See `tensor_hash`."""
    return tensor_hash(state)


def save_weights(
    net_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    metadata: Mapping[str, str],
) -> None:
    """Write weights as safetensors with a checksum; the whole file is there or none.

    Args:
        net_or_state: the network, or its state dict.
        path: file to write or replace, named `*.safetensors`; its folder is made if need be.
        metadata: what to say about the weights in the file's header.
    """
    state = net_or_state.state_dict() if isinstance(net_or_state, torch.nn.Module) else net_or_state
    tensor_files.write_tensors(Path(path), state, metadata)
