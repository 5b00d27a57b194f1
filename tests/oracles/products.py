"""Products of codes, slow and obvious: exactly in double precision, and as a CPU without VNNI instructions adds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class ExactProduct:
    """What `tdq_exp.deploy.products.Product` gives where it is exact. The same arguments."""

    def __init__(self, weight: Tensor, scale: Tensor, window=None) -> None:
        self.weight, self.scale, self.window = weight.double(), scale.double(), window

    def __call__(self, codes: Tensor, s: float, z: int, bias: Tensor | None = None) -> Tensor:
        """scale s sum (codes - z) weight + bias; padding is of zeros, after z was taken off."""
        x = codes.double() - z
        if self.window is None:
            y, shape = F.linear(x, self.weight), (-1,)
        else:
            y, shape = F.conv2d(x, self.weight, None, *self.window), (-1, 1, 1)

        y = y * s * self.scale.reshape(shape)
        return (y if bias is None else y + bias.double().reshape(shape)).float()


def saturating_sums(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """sum codes weight as `vpmaddubsw` makes it: neighbours are added in pairs, and each pair is cut off at 16 bits.

    Args:
        codes: uint8, `[rows, in]`.
        weight: int8, `[out, in]`.
    """
    products = codes.astype(np.int64)[:, None, :] * weight.astype(np.int64)[None, :, :]
    if products.shape[-1] % 2:
        products = np.pad(products, ((0, 0), (0, 0), (0, 1)))

    pairs = products[..., 0::2] + products[..., 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(-1)


def integer_sums(codes: Tensor, weight: Tensor, zero: Tensor, window: Sequence[int]) -> Tensor:
    """sum (codes - zero) weight in int64: place by place of a window, beyond the border nothing.

    Args:
        codes: integers `[B, C, H, W]`, or `[..., C]` without a window.
        weight: integers `[out, C, height, width]`, or `[out, C]`.
        zero: integers that broadcast to codes.
        window: height and width, stride, padding and dilation, two numbers each.
    """
    x, w = codes.long() - zero.long(), weight.long()
    if not window:
        return (x.unsqueeze(-2) * w).sum(-1)

    height, width, down, right, pad_y, pad_x, far_y, far_x = window
    x = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    total = torch.zeros((), dtype=torch.long)
    for i in range(height):
        for j in range(width):
            rows = slice(i * far_y, x.shape[2] - (height - 1 - i) * far_y, down)
            columns = slice(j * far_x, x.shape[3] - (width - 1 - j) * far_x, right)
            seen = x[:, None, :, rows, columns]
            total = total + (seen * w[None, :, :, i, j, None, None]).sum(2)
    return total
