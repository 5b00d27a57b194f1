"""The precision of matrix products and convolutions.

float32    as it is said: TF32, which torch takes for convolutions unless told, is off
tf32       operands rounded to 10 bits of mantissa, on GPUs that have it
bfloat16   autocast
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "tf32", "bfloat16")


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Compute float32 products as a precision says, within the block; backward passes included.

    Args:
        precision: one of `PRECISIONS`; bfloat16 leaves float32 products as they are (`autocast`).
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
