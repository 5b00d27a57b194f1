"""Weights and inputs as functions of a name, so that two programs can fill two networks with the same numbers."""

import math
import zlib

import torch


def ramp(key: str, count: int) -> torch.Tensor:
    """Numbers in [-1, 1), from integers alone, so that they are the same bits everywhere; float64, [count]."""
    prime = 65521
    start = zlib.crc32(key.encode()) % prime
    index = torch.arange(count, dtype=torch.int64) + start
    return (index**2 * (1 + start % 97) % prime).double() / prime * 2 - 1


def formula(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the original network as a function of its name; small enough that norm_eps shows in the output."""
    values = ramp(key, math.prod(shape))
    if len(shape) > 1:
        values = 0.35 * math.sqrt(3 / math.prod(shape[1:])) * values
    elif key.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.02 * values
    return values.float().reshape(shape)
