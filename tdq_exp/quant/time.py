"""The time step that a network is being evaluated at.

One `TimeContext` per network. The network's root forward sets it, and `with time.at(t):` does so
for work on a part of the network. It stays set after the forward, so backward finds it; a deep copy
of the network has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IN_FLOAT32 = (
    "a quantized network computes in float32; for speed use autocast,"
    " `with torch.autocast(device, torch.bfloat16): net(x_t, t)`"
)


class _Float32:
    """Refuses a network's conversion to another floating type, before any of it is converted.

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


class TimeContext:
    """The current t, integer, in 0..T-1: 0-dim for one time step for the whole batch, or `[B]`.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.version = 0  # grows at every change: what is computed from t can be kept until then
        self.kept: tuple[object, Tensor] | None = None  # who computed what from t, in compiled code
        self._t: Tensor | None = None
        self._index: int | None = None

    @property
    def t(self) -> Tensor:
        """Return the current time step.

        Raises:
            RuntimeError: if none is set.
        """
        if self._t is None:
            raise RuntimeError(
                "no time step is set: call the whole network, or wrap the call in"
                " `with time.at(t):`"
            )
        return self._t

    @property
    def index(self) -> int:
        """Return the current time step as a number; it is read once from its tensor.

        Raises:
            RuntimeError: if none is set.
            ValueError: if the samples of a batch have time steps of their own.
        """
        if self._index is None:
            if self.t.numel() != 1:
                raise ValueError("integer layers take one time step for the whole batch")
            self._index = int(self.t)
        return self._index

    def set(self, t: Tensor | int | None) -> None:
        """Set the time step until it is set again.

        Args:
            t: whole numbers; some samplers (Euler, Heun) hold theirs as floats.

        Raises:
            ValueError: for a t that is not whole, is no time step, or has more than one axis.
        """
        if t is not None:
            if isinstance(t, int) and not 0 <= t < self.steps:
                raise ValueError(f"t must be from 0 to {self.steps - 1}, not {t}")
            t = torch.as_tensor(t)
            if t.dtype == torch.bool or t.is_complex() or t.dim() > 1:
                raise ValueError(
                    f"t must be an integer or a vector of integers, not {t.dtype} of shape"
                    f" {tuple(t.shape)}"
                )

            # A tensor's values are looked at only where they have to be: it may be on a GPU.
            if t.is_floating_point():
                t = self._whole(t)
        self._t, self._index, self.kept = t, None, None
        self.version += 1

    def _whole(self, t: Tensor) -> Tensor:
        """Return time steps that are held as floats, as integers."""
        whole = t.long()
        if not bool((whole == t).all()):
            raise ValueError(
                f"t must be whole, not {t.flatten().tolist()[:3]}: step sizes are known at the"
                f" {self.steps} time steps only; sample with DDIM, DDPM, PNDM or DPM-Solver++, or"
                " with timestep_spacing='leading'"
            )
        if bool(((whole < 0) | (whole >= self.steps)).any()):
            raise ValueError(
                f"t must be from 0 to {self.steps - 1}, not {whole.flatten().tolist()[:3]}"
            )
        return whole

    @contextmanager
    def at(self, t: Tensor | int) -> Iterator[None]:
        """Set the time step within the block, and put the earlier one back."""
        before = self._t
        self.set(t)
        try:
            yield
        finally:
            self.set(before)

    def follow(self, net: nn.Module) -> None:
        """Make the root forward of `net(x, t, ...)` set the time step, and keep it in float32.

        The hook is a bound method, so a deep copy of the network gets a hook bound to the copied
        context.
        """
        net.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        net._apply = _Float32(net).apply  # type: ignore[method-assign,assignment]

    def _before_forward(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else kwargs.get("sample")
        if (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.dtype != torch.float32
            and not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(f"x_t is {x.dtype}: {IN_FLOAT32}")
        self.set(args[1] if len(args) > 1 else kwargs["timestep"])
