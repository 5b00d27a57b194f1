"""Keeps shared step sizes and random draws the same when torch recomputes a block.

`torch.utils.checkpoint` discards a block's activations and recomputes them in the backward pass.
A bank's step sizes are computed once for the whole network, within the first block that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tdq_exp.quant.time import TimeContext


def of_no_block() -> AbstractContextManager[Any]:
    """Exempt what is computed in the context from being discarded with the block around it.

    For step sizes that all blocks share: they exist already when a later block runs, so the block
    that computed them would save other tensors when it is recomputed.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def same_draws(owner: object, time: TimeContext, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers in each evaluation of one forward pass.

    Args:
        owner: who draws.
        time: says which pass it is; it keeps the state of the generator.
        device: of what is drawn.
    """
    if _capturing(device):
        yield
        return

    current, generator = time.now, _default_generator(device)
    now = generator.get_state()
    if current.drawn is None or current.drawn[0] is not owner:
        current.drawn = (owner, now)
        yield
        return

    generator.set_state(current.drawn[1])
    try:
        yield
    finally:
        generator.set_state(now)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


def _capturing(device: torch.device) -> bool:
    """Return whether a graph of kernels is being recorded: its draws are replayed by others."""
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())
