"""Blocks of a network compiled by torch for training, each by itself and for one batch size.

A block's chains of small operations become a few kernels. The arithmetic stays, but its order and
rounding are the compiler's: a network that was trained so says so in its row.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tdq_exp.quant.intervals.base import bank_of

KEY = "launcher.compile=true"
VARIANTS = 4  # of each block: while training and not, in each of two phases


def blocks_to_compile(net: nn.Module) -> list[nn.Module]:
    """Return a network's residual and attention blocks, in the order of its modules.

    Raises:
        ValueError: naming the key, if there is none.
    """
    kinds = (ResnetBlock2D, Attention)
    found: list[nn.Module] = [m for m in net.modules() if isinstance(m, kinds)]
    if not found:
        raise ValueError(f"{KEY}: {type(net).__name__} has no such blocks; set it to false")
    return found


class CompiledBlocks:
    """The blocks of a network, compiled in place; parameters and the state dict stay as they are.

    Copies of the network that were made before are not compiled.

    Args:
        net: a network of diffusers, float or quantized in training form.
        backend: of torch's compiler.

    Raises:
        ValueError: if it has no such blocks.
    """

    def __init__(self, net: nn.Module, backend: str = "inductor") -> None:
        self.active = True
        self._blocks = blocks_to_compile(net)

        # Blocks share the code of their class, and torch counts compiled forms by the code.
        config: Any = torch._dynamo.config
        wanted = VARIANTS * len(self._blocks)
        config.recompile_limit = max(config.recompile_limit, wanted)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, wanted)

        for block in self._blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)

        # Step sizes belong to no block: all blocks are given those that are computed here.
        bank = self._bank = bank_of(net)
        if bank is not None:

            def before(net: nn.Module, args: object) -> None:
                if torch.is_grad_enabled() and net.training:
                    bank.prepare(compiled=True)

            net.register_forward_pre_hook(before)

    def try_out(self, run: Callable[[], object]) -> None:
        """Compile by running once; where that fails, let the blocks run as they were, and say so.

        Args:
            run: a forward and a backward pass of the network, as it will be run.
        """
        if not self.active:
            return
        if self._bank is not None:
            self._bank.forget()  # of an earlier phase: its graph is tied to another stream

        failed: str | None = None
        try:
            with warnings.catch_warnings():
                # The compiler looks at step sizes, which are no leaves, for a gradient.
                warnings.filterwarnings("ignore", message="The .grad attribute")
                run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way
            reason = " ".join(str(error).split("\n")[:2]).strip()[:200]  # who refused, and why
            failed = f"{type(error).__name__}: {reason}"

        if failed is not None:
            self._take_back()
            warnings.warn(
                f"{KEY}: the network is trained without compiling its blocks ({failed})",
                stacklevel=2,
            )

    def _take_back(self) -> None:
        self.active = False
        for block in self._blocks:
            block._compiled_call_impl = None  # what `nn.Module.compile` sets

        # The error may hold itself, and with it the graph of the pass that failed: the gradients of
        # its leaves are tied to a stream that a recording must not wait for.
        gc.collect()
