"""A quantized network stays in float32: step sizes, codes and their sums are of that type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IN_FLOAT32 = (
    "a quantized network computes in float32; for speed use autocast,"
    " `with torch.autocast(device, torch.bfloat16): net(x_t, t)`"
)


def keep_in_float32(net: nn.Module) -> None:
    """Refuse a network's conversion to another floating type, and an x_t of one.

    Args:
        net: the root, called as `net(x_t, t, ...)`.
    """
    net.register_forward_pre_hook(_require_input, with_kwargs=True)
    net._apply = _Conversion(net).apply  # type: ignore[method-assign,assignment]


class _Conversion:
    """Refuses a network's conversion before any of it is converted.

    Args:
        net: the root; `to`, `half`, `double` and the like all end in its `_apply`.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Do what `nn.Module._apply` does, if float32 stays float32.

        Raises:
            TypeError: one line that says what to do.
        """
        converted = fn(torch.zeros(1)).dtype
        if converted != torch.float32:
            raise TypeError(f"{converted}: {IN_FLOAT32}")
        return type(self.net)._apply(self.net, fn, recurse)


def _require_input(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs.get("sample")
    if (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dtype != torch.float32
        and not torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(f"x_t is {x.dtype}: {IN_FLOAT32}")
