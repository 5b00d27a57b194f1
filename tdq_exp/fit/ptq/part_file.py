"""Finished parts of a post-training fit on disk: what a block's fit can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.fit.ptq.blocks import Block
from tdq_exp.fit.ptq.reconstruct import readers_of
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.runtime import tensor_files
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.progress import console


def quant_layers(module: nn.Module, prefix: str = "") -> dict[str, QuantLayer]:
    """Return the quantized layers of a module, by name in the network.

    Args:
        module: a network, or a block of it.
        prefix: name of the block.
    """
    dot = f"{prefix}." if prefix else ""
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, QuantLayer)]
    return {f"{dot}{name}".rstrip("."): layer for name, layer in layers}


def state_of(net: nn.Module, block: Block, rounded: bool = False) -> dict[str, Any]:
    """Return a copy of all that a fit can change in a block.

    Args:
        net: the quantized network.
        block: whose quantizers, generators and, if they are, rounded weights are meant.
        rounded: whether the rounding of its weights is learned.
    """
    quantizers = {
        name: {key: value.clone() for key, value in q.state_dict().items()}
        for name, q in block.quantizers.items()
    }

    # The rows of the network's bank that are trained with this block.
    bank, readers = readers_of(block.quantizers)
    generators = {}
    if bank is not None:
        part = bank.subset([interval.row for interval in readers.values()])
        generators = {key: value.clone() for key, value in part.state_dict().items()}

    # Codes, where the rounding was learned, too.
    codes = {}
    if rounded:
        for name, layer in quant_layers(net.get_submodule(block.name), block.name).items():
            coded: Any = layer.weight_quantizer
            codes[name] = coded.codes.clone()

    return {"quantizers": quantizers, "generators": generators, "codes": codes}


@torch.no_grad()
def put_back(net: nn.Module, block: Block, state: dict[str, Any]) -> None:
    """Put back what `state_of` gave."""
    for name, q in block.quantizers.items():
        q.load_state_dict(state["quantizers"][name])

    bank, readers = readers_of(block.quantizers)
    if bank is not None:
        part = bank.subset([interval.row for interval in readers.values()])
        part.load_state_dict(state["generators"])
        bank.take_back(part)

    for name, codes in state["codes"].items():
        coded: Any = net.get_submodule(name).weight_quantizer
        coded.load_state_dict({**coded.state_dict(), "codes": codes})


def read_part(file: Path, context: RunContext) -> dict[str, Any] | None:
    """Return a finished part of this fit, the same on every process, or None.

    A damaged part counts as none: it is made again, and a line says so.

    Raises:
        ValueError: if the file is of another fit.
    """

    def load() -> dict[str, Any] | None:
        try:
            found = tensor_files.read_state(file)
        except ValueError as error:
            console.print(f"{str(error).partition(';')[0]}: made again")
            return None
        if found is not None and found.get("fingerprint") != context.fingerprint:
            raise ValueError(
                f"{file}: a block of another fit; remove {file.parent} to start this one"
            )
        return found

    return context.processes.decide(load)
