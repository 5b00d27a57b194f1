"""The time step that a network is being evaluated at.

One `TimeContext` per network. The network's root forward sets it, and `with time.at(t):` does so
for work on a part of the network. It stays set after the forward; each thread has its own, and so
has a deep copy of the network. A block that is computed again in the backward pass reads that of
its own forward pass (`passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdq_exp.quant import kernels
from tdq_exp.quant.passes import Pass, Passes, backward_of_its_own, place

T = TypeVar("T")


def _tensors(output: object) -> list[Tensor]:
    """Return the tensors of what a network answers: one, several, or by name."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    answers = output if isinstance(output, list | tuple) else [output]
    return [answer for answer in answers if isinstance(answer, Tensor)]


def _required(what: T | None) -> T:
    """Return the argument, which must not be None.

    Raises:
        RuntimeError: if no time step is set.
    """
    if what is None:
        raise RuntimeError(
            "no time step is set: call the whole network, or wrap the call in `with time.at(t):`"
        )
    return what


class TimeContext:
    """The current t, integer, in 0..T-1: 0-dim for one time step for the whole batch, or `[B]`.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.version = 0  # grows at every change: what is computed from t can be kept until then
        self.kept: tuple[object, Tensor] | None = None  # who computed what from t, in compiled code

        # What was set last, by any thread, or by a backward pass: compiled code knows of nothing
        # else.
        self._t: Tensor | None = None
        self._by_compiled = False  # whether compiled code set it, which begins no pass
        self.passes = Passes()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the time step, and no part in passes of the original."""
        own = {"_t": self._own(), "kept": None, "_by_compiled": True, "passes": Passes()}
        return self.__dict__ | own

    @property
    def t(self) -> Tensor:
        """Return the current time step.

        Raises:
            RuntimeError: if none is set, or if it can't be told in a backward pass.
        """
        if torch.compiler.is_compiling():
            return _required(self._t)
        return self.now.t

    @property
    def now(self) -> Pass:
        """Return the current pass: what is computed from t can be kept for it.

        Compiled code has none.

        Raises:
            RuntimeError: as for `t`.
        """
        if self._by_compiled:
            self._begin(self._t)
        return _required(self.passes.current())

    @property
    def key(self) -> object:
        """Return a cache key: values computed from t can be reused while it stays the same."""
        if torch.compiler.is_compiling():
            return self.version
        return self.now, backward_of_its_own()

    @property
    def index(self) -> int:
        """Return the current time step as a number; it is read once from its tensor.

        Raises:
            RuntimeError: if none is set.
            ValueError: if the samples of a batch have time steps of their own.
        """
        now = self.now
        if now.index is None:
            if now.t.numel() != 1:
                raise ValueError("integer layers take one time step for the whole batch")
            now.index = int(now.t)
        return now.index

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

            # A tensor's values are looked at where they have to be, or cost no waiting for a GPU.
            if t.is_floating_point():
                t = self._whole(t)
            elif t.device.type == "cpu" and not kernels.traced(t):
                self._require_range(t)

        self._change(t)
        if torch.compiler.is_compiling():
            self._by_compiled = True
        else:
            self._begin(t)

    def _change(self, t: Tensor | None) -> None:
        self._t, self.kept = t, None
        self.version += 1

    def _begin(self, t: Tensor | None) -> None:
        self._by_compiled = False
        self.passes.begin(t)

    def _whole(self, t: Tensor) -> Tensor:
        """Return time steps that are held as floats, as integers."""
        whole = t.long()
        if not bool((whole == t).all()):
            raise ValueError(
                f"t must be whole, not {t.flatten().tolist()[:3]}: step sizes are known at the"
                f" {self.steps} time steps only; sample with DDIM, DDPM, PNDM or DPM-Solver++, or"
                " with timestep_spacing='leading'"
            )
        self._require_range(whole)
        return whole

    def _require_range(self, t: Tensor) -> None:
        if bool(((t < 0) | (t >= self.steps)).any()):
            raise ValueError(
                f"t must be from 0 to {self.steps - 1}, not {t.flatten().tolist()[:3]}"
            )

    @contextmanager
    def at(self, t: Tensor | int) -> Iterator[None]:
        """Set the time step within the block, and put the earlier one back."""
        # In a backward pass it is for the block alone that is computed again.
        if not torch.compiler.is_compiling() and place() is not None:
            before = self._t
            with self.passes.within_block():
                self.set(t)
                try:
                    yield
                finally:
                    self._change(before)
            return

        before = self._own()
        self.set(t)
        try:
            yield
        finally:
            self._finish()
            self.set(before)

    def _own(self) -> Tensor | None:
        """Return this thread's time step outside of a backward pass, or None if none is set."""
        if torch.compiler.is_compiling() or self._by_compiled:
            return self._t
        own = self.passes.own()
        return None if own is None else own.t

    def _finish(self) -> None:
        if not torch.compiler.is_compiling():
            self.passes.finish()

    def follow(self, net: nn.Module) -> None:
        """Make the root forward of `net(x, t, ...)` set the time step.

        The hook is a bound method, so a deep copy of the network gets a hook bound to the copied
        context.
        """
        net.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        net.register_forward_hook(self._after_forward)

    def _before_forward(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.set(args[1] if len(args) > 1 else kwargs["timestep"])

    def _after_forward(self, net: nn.Module, args: object, output: object) -> None:
        self._finish()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            put_back = self._when_back()
            for answer in _tensors(output):
                if answer.requires_grad:
                    answer.register_hook(put_back)

    def _when_back(self) -> Callable[[Tensor], None]:
        """Return a hook for the network's output that restores this pass' time step in backward.

        Compiled code reads only the time step that was set last, but a compiled block may be
        recomputed in the backward pass. Autograd visits nodes in reverse order of creation, so it
        handles one pass after another and reaches the output of each first.
        """
        t, kept = self._t, self.kept

        def put_back(gradient: Tensor) -> None:
            if self._t is not t:
                self._change(t)
                self.kept = kept

        return put_back
