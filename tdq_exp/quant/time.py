"""The time step that a network is being evaluated at.

One `TimeContext` per network. The network's root forward sets it, and `with time.at(t):` does so
for work on a part of the network. It stays set after the forward, so backward finds it; a deep copy
of the network has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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

        Raises:
            ValueError: for a t that is not of integers, or has more than one axis.
        """
        if t is not None:
            t = torch.as_tensor(t)
            if t.is_floating_point() or t.dim() > 1:
                raise ValueError(
                    f"t must be an integer or a vector of integers, not {t.dtype} of shape"
                    f" {tuple(t.shape)}"
                )
        self._t, self._index, self.kept = t, None, None
        self.version += 1

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
        """Make the root forward of `net(x, t, ...)` set the time step.

        The hook is a bound method, so a deep copy of the network gets a hook bound to the copied
        context.
        """
        net.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.set(args[1] if len(args) > 1 else kwargs["timestep"])
