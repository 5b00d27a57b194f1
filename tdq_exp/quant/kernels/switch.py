"""Whether a fused kernel may be called: the switch that turns them off, and tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_on = True


@contextmanager
def unfused() -> Iterator[None]:
    """Run one tensor operation after another within the block, to compare."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def enabled() -> bool:
    """Return whether fused kernels are on: everywhere but within `unfused`."""
    return _on


def by_rows(x: Tensor, *per_row: Tensor | None) -> bool:
    """Return whether s, z and the like can be read by a kernel beside x.

    They are float32 on its device (their memory would be read as something else), and one for all
    rows or one for each.
    """
    return all(
        v.dtype == torch.float32
        and v.device == x.device
        and (v.numel() == 1 or v.numel() == len(v) == len(x))
        for v in per_row
        if v is not None
    )


def traced(x: Tensor) -> bool:
    """Return whether somebody records or replaces the operations on x.

    True under torch.compile, torch.export, torch.jit.trace, make_fx and dispatch modes, and for
    subclasses such as FakeTensor. A kernel that reads x's memory would be missed by whoever
    records, and a fake tensor has no memory: there, the registered operators are called in its
    place.
    """
    return (
        torch.compiler.is_compiling()
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
