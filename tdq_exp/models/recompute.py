"""Activations that are computed again in the backward pass, for cards with little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tdq_exp.quant.intervals.base import bank_of


def require_blocks(net: nn.Module) -> None:
    """Refuse a network whose activations can't be computed again, block by block.

    Raises:
        ValueError: naming the key.
    """
    if not getattr(net, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"launcher.recompute=true: not known to {type(net).__name__}; set it to false"
        )


def recompute_activations(net: nn.Module) -> None:
    """Keep the inputs of a network's blocks only, and compute what lies within them once more.

    The gradients are the same, in about a third more time. In place; while evaluating it has no
    effect.

    Args:
        net: a network of diffusers, float or quantized in training form.

    Raises:
        ValueError: if it has no such blocks.
    """
    require_blocks(net)

    # What is drawn at random within a block is drawn again, which takes the generators' states.
    drawn = any(
        getattr(module, "draws_noise", False) or (isinstance(module, nn.Dropout) and module.p > 0)
        for module in net.modules()
    )

    def again(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=drawn)

    network: Any = net
    network.enable_gradient_checkpointing(again)

    # Step sizes belong to no block: computed within the first, they would be missing there later.
    bank = bank_of(net)
    if bank is not None:

        def before(net: nn.Module, args: object) -> None:
            if torch.is_grad_enabled() and net.training:
                bank.prepare(compiled=False)

        net.register_forward_pre_hook(before)
