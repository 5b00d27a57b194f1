"""Bit operations of one forward pass: multiplications times the bits of both factors.

    convolution, linear layer    products * b_weight * b_input
    q k^T and softmax(...) v     products * b_act^2, or 32^2 where attention matrices stay float

Sums, norms and activation functions are not counted, as usual.

References:
    Baskin et al., "UNIQ: Uniform Noise Injection for Non-Uniform Quantization of Neural Networks",
        ACM Transactions on Computer Systems 2021 (the measure).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tdq_exp.quant.convert import Recipe
from tdq_exp.quant.roles import Role

FLOAT_BITS = 32


def products(
    net: nn.Module, forward: Callable[[], object]
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the multiplications of every leaf in one forward pass, and the shape of its output.

    Args:
        net: a float network.
        forward: runs it once.
    """
    counted: dict[str, tuple[int, tuple[int, ...]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def count(leaf: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            # Each element of the output is a sum over one output's row of weights.
            assert isinstance(leaf.weight, Tensor)
            counted[name] = y.numel() * leaf.weight[0].numel(), tuple(y.shape)

        return count

    handles = [
        leaf.register_forward_hook(watch(name))
        for name, leaf in net.named_modules()
        if isinstance(leaf, nn.Conv2d | nn.Linear)
    ]

    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return counted


def bit_operations(
    counted: Mapping[str, tuple[int, tuple[int, ...]]],
    roles: Mapping[str, Role],
    recipe: Recipe | None,
) -> int:
    """Return the bit operations of a network's forward pass.

    Args:
        counted: see `products`, of one sample.
        roles: by leaf name.
        recipe: of its quantizers; None for the float network.
    """
    total = 0
    blocks: dict[str, tuple[int, ...]] = {}

    # Convolutions and linear layers.
    for name, (count, shape) in counted.items():
        role = roles[name]
        bits = recipe and recipe.plan.bits(role, recipe.weight_bits, recipe.act_bits)
        total += count * (bits.weight * bits.act if bits else FLOAT_BITS**2)

        if role.kind == "attention_qkv":
            blocks.setdefault(role.block, shape)

    # Both products inside of each attention block: tokens x tokens x channels.
    quantized = recipe is not None and recipe.plan.attention
    act = recipe.act_bits if recipe is not None and quantized else FLOAT_BITS
    for shape in blocks.values():
        _, tokens, channels = shape
        total += 2 * tokens**2 * channels * act**2

    return total
