"""A network as blocks, in the order in which they run, and what goes in and out of each.

Blocks are the model's (`Role.block`): residual blocks, attention blocks, and what is left, layer by
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdq_exp.diffusion.draws import Stream
from tdq_exp.diffusion.objective import NetworkInput
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.roles import Role


@dataclass(frozen=True)
class Block:
    """One unit of reconstruction.

    Args:
        name: of its module.
        quantizers: its activation quantizers, by their names in the network.
    """

    name: str
    quantizers: dict[str, Quantizer]


@torch.no_grad()
def blocks_of(net: nn.Module, model: DiffusionModel, roles: Mapping[str, Role]) -> list[Block]:
    """Return the blocks of a quantized network in running order.

    A block without a quantized layer is left out.
    """
    names = list(dict.fromkeys(role.block for role in roles.values()))

    # One forward pass tells the order.
    order: list[str] = []
    handles = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.append(name)
        )
        for name in names
    ]

    example = NetworkInput(
        torch.zeros(1, *model.sample_shape),
        torch.zeros(1, dtype=torch.long),
        model.draw_condition(0, Stream.IMAGE, range(1)),
    )
    try:
        model.predict(net, *example.to(next(net.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()

    # Each block with the quantizers inside it; no quantizer may be left out.
    quantizers = activation_quantizers(net)
    found = []
    for name in dict.fromkeys(order):
        own = {q: module for q, module in quantizers.items() if q.startswith(f"{name}.")}
        if own:
            found.append(Block(name, own))

    if missing := quantizers.keys() - {q for block in found for q in block.quantizers}:
        raise RuntimeError(f"in no block: {sorted(missing)[:3]}")
    return found


class _Reached(Exception):
    """The block was called: the rest of the network is not needed."""


@dataclass
class Call:
    """How a block was called: tensors, and everything else in its place.

    Args:
        tensors: the arguments that are tensors, positional ones first.
        places: of each, its position or keyword.
        args, kwargs: the whole call, tensors included; they show where the tensors go.
    """

    tensors: list[Tensor]
    places: list[int | str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self, block: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        """Call the block with other tensors in the same places."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, tensor in zip(self.places, tensors, strict=True):
            if isinstance(place, int):
                args[place] = tensor
            else:
                kwargs[place] = tensor
        return block(*args, **kwargs)


@torch.no_grad()
def inputs_of(net: nn.Module, name: str, run: Callable[[], object]) -> Call:
    """Run the network up to a block and return the call that it would get."""
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places: list[int | str] = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        places += [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        tensors = [args[place] if isinstance(place, int) else kwargs[place] for place in places]
        found.append(Call(tensors, places, args, kwargs))
        raise _Reached

    _run_to(net.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True), name, run)
    return found[0]


@torch.no_grad()
def output_of(net: nn.Module, name: str, run: Callable[[], object]) -> Tensor:
    """Run the network up to the end of a block and return the block's output."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output)
        raise _Reached

    _run_to(net.get_submodule(name).register_forward_hook(stop), name, run)
    return found[0]


def _run_to(hook: RemovableHandle, name: str, run: Callable[[], object]) -> None:
    """Run the network until the hook of a block ends it."""
    try:
        run()
    except _Reached:
        return
    finally:
        hook.remove()
    raise RuntimeError(f"{name}: the network does not call it")
