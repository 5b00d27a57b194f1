"""Hashes of tensors and arrays: their names in fingerprints, whatever file held them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def tensor_hash(tensors: Mapping[str, Tensor], shape_as: Callable[[torch.Size], Any] = list) -> str:
    """Return the hash of named tensors.

    hash = first 16 hex digits of SHA-256 over (name, dtype, shape, bytes) of each, sorted by name

    It depends neither on the device nor on the memory layout.

    Args:
        tensors: of any shape and type, by name.
        shape_as: how a shape is spelled, `list` or `tuple`. Recorded hashes of models have lists
            and those of feature networks have tuples, and neither may change.
    """
    digest = hashlib.sha256()

    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {shape_as(tensor.shape)}\n".encode())
        # As bytes, because NumPy does not know bfloat16.
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy(force=True).data)

    return digest.hexdigest()[:16]


def images_hash(pixels: NDArray[np.uint8]) -> str:
    """Return the hash of a set of images, read piece by piece.

    hash = first 16 hex digits of SHA-256 over (shape, bytes)

    Args:
        pixels: `[N, H, W, C]`.
    """
    digest = hashlib.sha256(repr(pixels.shape).encode())
    for start in range(0, len(pixels), 1024):
        digest.update(pixels[start : start + 1024].tobytes())
    return digest.hexdigest()[:16]
