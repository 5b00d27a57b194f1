"""Packed networks: weights at their real bit width, step sizes as tables, nothing else.

A packed file is a safetensors file of a baked network's tensors, in which

    codes of weights    are numbers of b bits, lowest bit first, one after another: two 4-bit codes
                        a byte
    zero points         are in the smallest integer type that holds them

and everything else (step sizes, biases, norms) is as it was. The header says how to undo it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdq_exp.models.weights.save import save_weights
from tdq_exp.quant.layers import smallest_integer_type
from tdq_exp.runtime import files, tensor_files

FORMAT = "tdq_exp packed 1"
# What a header raises that does not describe the tensors beside it.
MISFIT = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
CHUNK = 1 << 20  # codes at a time; a multiple of 8, so that chunks end at whole bytes


def pack_codes(codes: Tensor, n: int, bits: int) -> Tensor:
    """Return integers n..n + 2^b - 1 as bytes, uint8 `[ceil(N b / 8)]`.

    Args:
        codes: any shape, integer.
        n: what 0 stands for.
        bits: b, 1 to 16.
    """
    flat = (codes.reshape(-1).to(torch.int32) - n).numpy()
    parts = [
        np.packbits(
            (flat[i : i + CHUNK, None] >> np.arange(bits) & 1).astype(np.uint8), bitorder="little"
        )
        for i in range(0, len(flat), CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.uint8))


def unpack_codes(packed: Tensor, shape: tuple[int, ...], n: int, bits: int) -> Tensor:
    """Return the codes that `pack_codes` packed, int32.

    Raises:
        ValueError: if there are not as many bytes as the shape needs.
    """
    count = math.prod(shape)
    if len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed)} bytes do not hold {count} codes of {bits} bits")
    raw, weights = packed.numpy(), (1 << np.arange(bits)).astype(np.int32)
    flat = np.empty(count, np.int32)
    for i in range(0, count, CHUNK):
        size = min(CHUNK, count - i)
        read = np.unpackbits(
            raw[i * bits // 8 : -(-(i + size) * bits // 8)], count=size * bits, bitorder="little"
        )
        flat[i : i + size] = read.reshape(size, bits) @ weights + n
    return torch.from_numpy(flat.reshape(shape))


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a baked network's state dict in packed form, and how to undo it, by key."""
    packed, how = {}, {}
    for key, value in state.items():
        if key.endswith(".weight_quantizer.codes"):
            low, high = int(value.min()), int(value.max())

            # As few bits as the codes of this layer need.
            bits = max(1, (high - low).bit_length())
            packed[key] = pack_codes(value, low, bits)

            how[key] = {
                "codes": bits,
                "n": low,
                "shape": list(value.shape),
                "type": _name(value.dtype),
            }
        elif key.endswith((".zero_points", ".weight_quantizer.zero_point")):
            small = smallest_integer_type(int(value.min()), int(value.max()))
            packed[key], how[key] = value.to(small), {"type": _name(value.dtype)}
        else:
            packed[key] = value

    return packed, how


def unpack(packed: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict that `pack` packed, bit for bit."""
    state = dict(packed)
    for key, rule in how.items():
        value, dtype = packed[key], getattr(torch, rule["type"])
        if not isinstance(dtype, torch.dtype) or not 1 <= rule.get("codes", 1) <= 16:
            raise ValueError(f"{key}: codes of no known type")
        if "codes" not in rule:
            state[key] = value.to(dtype)
            continue

        # A type that does not hold a code would make another number of it.
        if type(rule["n"]) is not int or abs(rule["n"]) >= 1 << 30:
            raise ValueError(f"{key}: codes from {rule['n']!r:.20} on")
        codes = unpack_codes(value, tuple(rule["shape"]), rule["n"], rule["codes"])
        state[key] = codes.to(dtype)
        if dtype.is_complex or not torch.equal(state[key].to(codes.dtype), codes):
            raise ValueError(f"{key}: {rule['type']} does not hold its codes")

    return state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(
    state: Mapping[str, Tensor],
    path: Path,
    config: Mapping[str, Any],
    fit: str,
    parts: Mapping[str, str] | None = None,
) -> int:
    """Write a packed file and return its bytes, after reading it back and comparing every bit.

    Args:
        state: of a baked network.
        path: `*.safetensors`.
        config: the run's configuration, as its record keeps it: what the network is built from.
        fit: the fit's fingerprint.
        parts: hashes of what its images depend on beside the network, such as an autoencoder.

    Raises:
        RuntimeError: if what was read is not what was written.
    """
    packed, how = pack({key: value.cpu() for key, value in state.items()})
    about = {"format": FORMAT, "fit": fit, "config": json.dumps(config), "packed": json.dumps(how)}
    about |= {"parts": json.dumps(parts)} if parts else {}
    save_weights(packed, path, about)
    read, *_ = load(path)
    if read.keys() != state.keys() or not all(
        torch.equal(read[key], value.cpu()) for key, value in state.items()
    ):
        raise RuntimeError(f"{path}: reads back differently")
    return path.stat().st_size


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str, dict[str, str]]:
    """Read a packed file.

    Returns:
        The state dict of the baked network, the configuration, the fit's fingerprint, and the
        hashes of other parts.

    Raises:
        ValueError: if the file is damaged, or is not a packed network.
    """
    files.require_regular(path)
    try:
        found = tensor_files.read_tensors(path)
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error

    about = found.metadata
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a packed network (its header does not say `{FORMAT}`)")

    # What the header says may be anything.
    try:
        state = unpack(found.tensors, json.loads(about["packed"]))
        config, parts = json.loads(about["config"]), json.loads(about.get("parts", "{}"))
        return state, config, about["fit"], parts
    except MISFIT as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    """Return the error of a packed file that can't be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix(f"{path}: ")
    return ValueError(f"{path}: damaged or missing packed network ({reason})")
