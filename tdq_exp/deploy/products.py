"""Products of 8-bit codes by oneDNN's kernels, as torch ships them, and whether they are exact.

Without VNNI instructions, a kernel multiplies unsigned by signed bytes and adds the products of
neighbouring channels in pairs (`vpmaddubsw`). Such a sum is cut off at 16 bits, without a word.
With VNNI everything is added in 32 bits. So a product is exact

    on any CPU             if 2 |q_x|max |q_w|max <= 2^15 - 1: no pair reaches the limit
    on a CPU with VNNI     always

where q_x and q_w are the bytes that the kernel multiplies, zero points still in them. And no sum
may leave 32 bits: it would come back with another sign. That takes more than 65,793 products of
the largest bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Window = tuple[list[int], list[int], list[int], int]

PAIR_LIMIT = 2**15 - 1
SUM_LIMIT = 2**31 - 1
PROBE_CHANNELS = (6, 64)  # there are other kernels for few channels than for many


def never_saturates(largest_code: int, weight: Tensor) -> bool:
    """Return whether no sum of two products can leave 16 bits.

    Args:
        largest_code: of the input's unsigned bytes.
        weight: signed bytes.
    """
    largest_weight = int(weight.to(torch.int16).abs().max()) if weight.numel() else 0
    return 2 * largest_code * largest_weight <= PAIR_LIMIT


def fits_32_bits(largest_code: int, weight: Tensor) -> bool:
    """Return whether no sum of products can leave 32 bits, nor that of the codes alone.

    Args:
        largest_code: of the input's unsigned bytes.
        weight: signed bytes, `[out, ...]`.
    """
    rows = weight.flatten(1)
    if rows.shape[1] * largest_code * 128 <= SUM_LIMIT:
        return True
    most = int(rows.to(torch.int64).abs().sum(1).max()) if rows.numel() else 0
    return max(most, rows.shape[1]) * largest_code <= SUM_LIMIT


def exact_here(largest_code: int, weight: Tensor) -> bool:
    """Return whether `Product` is exact on this CPU for such codes; see `never_saturates`."""
    return never_saturates(largest_code, weight) or all_are_exact_here()


@lru_cache
def all_are_exact_here() -> bool:
    """Return whether `Product` is exact on this CPU for all codes.

    The largest products are computed and compared, which asks the kernels themselves: not every CPU
    with VNNI has AVX-512, and `ONEDNN_MAX_CPU_ISA` may forbid both.
    """
    for channels in PROBE_CHANNELS:
        weight, scale = (
            torch.full((channels, channels), -128, dtype=torch.int8),
            torch.ones(channels),
        )
        codes = torch.full((4, channels), 255, dtype=torch.uint8)
        image = (
            codes[..., None, None]
            .expand(-1, -1, 3, 3)
            .contiguous(memory_format=torch.channels_last)
        )

        # The largest sums there are: a cut-off would show in them.
        linear = Product(weight, scale)(codes, 1.0, 0)
        convolution = Product(weight[..., None, None], scale, ([1, 1], [0, 0], [1, 1], 1))(
            image, 1.0, 0
        )

        expected = -128.0 * 255 * channels
        if not (bool((linear == expected).all()) and bool((convolution == expected).all())):
            return False

    return True


class Product:
    """A linear layer or a convolution of unsigned codes with packed signed ones.

    Args:
        weight: int8, `[out, in]` or `[out, in / groups, height, width]`.
        scale: of each output channel, `[out]`.
        window: (stride, padding, dilation, groups) of a convolution; None for a linear layer.
    """

    def __init__(self, weight: Tensor, scale: Tensor, window: Window | None = None) -> None:
        self.scale, self.window = scale, window
        self.zero = torch.zeros(len(scale), dtype=torch.int32)
        self.packed: Tensor
        if window is None:
            self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        else:
            self.packed = torch.ops.onednn.qconv_prepack(
                weight.contiguous(), scale, 1.0, 0, *window, None
            )

    def __call__(self, codes: Tensor, s: float, z: int, bias: Tensor | None = None) -> Tensor:
        """Return scale s sum (codes - z) weight + bias, float32.

        Args:
            codes: uint8, `[..., in]` or `[B, in, H, W]`.
            s, z: their step size and zero point.
            bias: `[out]`.
        """
        if self.window is None:
            return torch.ops.onednn.qlinear_pointwise(
                codes,
                s,
                z,
                self.packed,
                self.scale,
                self.zero,
                bias,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )

        # A convolution: the same, with its window.
        return torch.ops.onednn.qconv2d_pointwise(
            codes,
            s,
            z,
            self.packed,
            self.scale,
            self.zero,
            bias,
            *self.window,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
