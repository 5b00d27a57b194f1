"""Writing weights as safetensors, and the hash that names them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tdq_exp.runtime import files
from tdq_exp.runtime.hashes import tensor_hash


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of a set of weights, the same in whatever file. See `tensor_hash`."""
    return tensor_hash(state)


def file_hash(path: Path) -> str:
    """The `state_hash` of a safetensors file in diffusers' names, as this project writes them."""
    return state_hash(load_file(path))


def save_weights(
    net_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    metadata: Mapping[str, str],
) -> None:
    """Write weights as safetensors; the file is there as a whole or not at all.

    Args:
        net_or_state: the network, or its state dict.
        path: file to write or replace, named `*.safetensors`; its folder is made if need be.
        metadata: what to say about the weights in the file's header.
    """
    path = Path(path)
    state = net_or_state.state_dict() if isinstance(net_or_state, torch.nn.Module) else net_or_state
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}

    with files.replacing(path) as part:
        # safetensors makes files that only their owner can read; weights get the usual mode.
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, dict(metadata))
        _sort_metadata(part)
        part.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, so that equal weights are equal files."""
    with path.open("r+b") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(content) == size:  # else it is spelled in another way, and stays as it is
            stream.seek(8)
            stream.write(content)
