"""Which fused kernels apply to a tensor: C on a CPU, Triton on a GPU, or none."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from tdq_exp.quant.kernels import cpu
from tdq_exp.quant.kernels.switch import by_rows, enabled, traced


@lru_cache
def _triton() -> ModuleType | str:
    """Return the GPU's kernels, or why there are none. Imported when they are first asked for."""
    try:
        from tdq_exp.quant.kernels import triton
    except ImportError as error:
        return f"no triton: {error}"
    return triton


@torch.compiler.assume_constant_result
def _available(on_gpu: bool) -> bool:
    """Return whether this kind of device has kernels; a constant where code is compiled."""
    return not isinstance(_triton() if on_gpu else cpu.library(), str)


def fused(x: Tensor, *per_row: Tensor | None) -> bool:
    """Return whether fused kernels apply.

    They do for float32 on a CPU, float32 and bfloat16 on a GPU, where s and z are float32 and one
    for all rows of x or one for each.
    """
    if not enabled() or not x.dim() or not x.numel() or not (x.is_cuda or x.device.type == "cpu"):
        return False
    if x.dtype != torch.float32 and not (x.is_cuda and x.dtype == torch.bfloat16):
        return False
    return by_rows(x, *per_row) and _available(x.is_cuda)


def fused_on_gpu(x: Tensor) -> bool:
    """Return whether Triton kernels can be called now, for a float32 tensor of any shape."""
    return (
        x.is_cuda and x.dtype == torch.float32 and enabled() and not traced(x) and _available(True)
    )


def kernels_for(x: Tensor) -> ModuleType:
    """Return the kernels that apply to a tensor: a module with `forward` and `backward`."""
    if not x.is_cuda:
        return cpu
    found = _triton()
    assert not isinstance(found, str), found
    return found


def result_type(x: Tensor) -> torch.dtype:
    """Return the type that fused kernels write x_hat in: float32, or autocast's own on a GPU.

    There, the layer that reads x_hat would round it to that type in a pass of its own, to the same
    bits.
    """
    if x.is_cuda and torch.is_autocast_enabled(x.device.type):
        wanted = torch.get_autocast_dtype(x.device.type)
        return wanted if wanted == torch.bfloat16 else torch.float32
    return torch.float32


def readable(x: Tensor) -> Tensor:
    """Return x in a type that quantizers compute in: float32, or bfloat16 where kernels read it."""
    if x.is_cuda and x.dtype == torch.bfloat16 and fused(x):
        return x
    return x.float()


def used(device: torch.device) -> str:
    """Return `fused`, with the language if it is not C, or why not; for the record."""
    if device.type == "cpu":
        found = cpu.library()
        return f"unfused: {found}" if isinstance(found, str) else "fused"
    if torch.empty(0, device=device).is_cuda:
        kernels = _triton()
        return f"unfused: {kernels}" if isinstance(kernels, str) else "fused: triton"
    return f"unfused: {device.type}"
