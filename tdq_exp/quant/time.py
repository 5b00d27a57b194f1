"""The time step that a network is being evaluated at.

One `TimeContext` per network. The network's root forward sets it, and `with time.at(t):` does so
for work on a part of the network. It stays set after the forward; each thread has its own, and so
has a deep copy of the network.

A block that is computed again in the backward pass (`torch.utils.checkpoint`) reads the time step
of its own forward pass, whatever passes came after it. Autograd numbers its nodes in the order of
their creation, so the number of the node whose gradient is being computed tells which pass it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdq_exp.quant import kernels

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


T = TypeVar("T")

PASSES = 1024  # of each thread, whose blocks may still be computed again

# (backward pass, node) while autograd computes the gradient of a node
Place = tuple[int, int]


def _place() -> Place | None:
    """Return where in a backward pass this is, or None outside of any."""
    node = torch._C._current_autograd_node()
    return None if node is None else (torch._C._current_graph_task_id(), node._sequence_nr())


def _required(what: T | None) -> T:
    """Return what is there.

    Raises:
        RuntimeError: if no time step is set.
    """
    if what is None:
        raise RuntimeError(
            "no time step is set: call the whole network, or wrap the call in `with time.at(t):`"
        )
    return what


class Moment:
    """A time step, from when a thread sets it until it sets the next one. Compared by identity.

    Args:
        t: the time step.
    """

    def __init__(self, t: Tensor) -> None:
        self.t = t
        self.index: int | None = None
        # Who drew random numbers for what follows from t, and the generator's state before that.
        self.drawn: tuple[object, Tensor] | None = None
        # Nodes of autograd from `start` on were made in it, up to `end`.
        self.start = torch.autograd._get_sequence_nr()
        self.end: int | None = None
        self.place = _place()  # where a block that is computed again set it

    def finish(self) -> None:
        """Note that the forward pass is over."""
        self.end = torch.autograd._get_sequence_nr()

    def made(self, node: int) -> bool:
        """Return whether a node of the same thread was made in it, by the node's number."""
        return self.start <= node and (self.end is None or node < self.end)


class TimeContext:
    """The current t, integer, in 0..T-1: 0-dim for one time step for the whole batch, or `[B]`.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.version = 0  # grows at every change: what is computed from t can be kept until then
        self.kept: tuple[object, Tensor] | None = None  # who computed what from t, in compiled code
        # What was set last, by any thread: compiled code knows of nothing else.
        self._t: Tensor | None = None
        self._last: Moment | None = None
        self._unnoted = False  # whether compiled code set it
        # By thread: the moment; that of a block which is computed again; the last ones.
        self._now: dict[int, Moment | None] = {}
        self._again: dict[int, Moment] = {}
        self._passes: dict[int, deque[Moment]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the time step, and no part in passes of the original."""
        none: dict[str, Any] = {"kept": None, "_last": None, "_unnoted": True}
        return self.__dict__ | none | {"_now": {}, "_again": {}, "_passes": {}}

    @property
    def t(self) -> Tensor:
        """Return the current time step.

        Raises:
            RuntimeError: if none is set, or if it can't be told in a backward pass.
        """
        if torch.compiler.is_compiling():
            return _required(self._t)
        return self.moment.t

    @property
    def moment(self) -> Moment:
        """Return the current moment: what is computed from t can be kept for it.

        Compiled code has none.

        Raises:
            RuntimeError: as for `t`.
        """
        if self._unnoted:
            self._note(self._t)

        thread, place = threading.get_ident(), _place()
        if place is None:
            return _required(self._now.get(thread, self._last))

        # Within a backward pass: set there, or that of the forward pass.
        again = self._again.get(thread)
        if again is None or again.place != place:
            again = self._again[thread] = self._of_node(place[1], again)
        return again

    def _of_node(self, node: int, again: Moment | None) -> Moment:
        """Return the moment in which a node of autograd was made.

        Args:
            node: its number.
            again: that of the block which was last computed again in this thread.

        Raises:
            RuntimeError: if it can't be told.
        """
        # Each thread counts for itself, and which of them made the node is not known.
        latest = []
        for passes in list(self._passes.values()):
            before = (moment for moment in reversed(passes) if moment.start <= node)
            latest += list(islice(before, 1))
        found = [moment for moment in latest if moment.made(node)]

        # Made while this thread computed a block again, which set a time step of its own.
        if not found and again is not None and again.place is not None and again.made(node):
            return again

        # Made by a part of the network after a pass, or by a block within one.
        if not found:
            found = list(dict.fromkeys([*latest, *([] if again is None else [again])]))
        if not found:
            return _required(self._now.get(threading.get_ident(), self._last))

        if len(found) > 1:
            raise RuntimeError(
                "a block is computed again in the backward pass, and which time step it had can't"
                " be told: put no checkpoint within another one, call parts of the network within"
                " `with time.at(t):`, and give each thread a copy of the network (copy.deepcopy)"
            )
        return found[0]

    @property
    def key(self) -> object:
        """Return what stays the same as long as what was computed from t can be used again."""
        if torch.compiler.is_compiling():
            return self.version

        # torch's older kind of checkpoint has a backward pass of its own for each block, which
        # frees the graph of what it reads.
        node = torch._C._current_autograd_node()
        apart = node is not None and "CheckpointFunction" in node.name()
        return self.moment, _place() if apart else None

    @property
    def index(self) -> int:
        """Return the current time step as a number; it is read once from its tensor.

        Raises:
            RuntimeError: if none is set.
            ValueError: if the samples of a batch have time steps of their own.
        """
        moment = self.moment
        if moment.index is None:
            if moment.t.numel() != 1:
                raise ValueError("integer layers take one time step for the whole batch")
            moment.index = int(moment.t)
        return moment.index

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
        self._t, self.kept = t, None
        self.version += 1
        if torch.compiler.is_compiling():
            self._unnoted = True
        else:
            self._note(t)

    def _note(self, t: Tensor | None) -> None:
        """Begin a moment of this thread."""
        thread, moment = threading.get_ident(), None if t is None else Moment(t)
        self._unnoted = False

        # While a block is computed again, it holds for that block alone.
        if _place() is not None:
            if moment is not None:
                self._again[thread] = moment
            return

        self._last = self._now[thread] = moment
        self._again.clear()
        if moment is not None:
            passes = self._passes.setdefault(thread, deque(maxlen=PASSES))
            if passes and passes[-1].start == moment.start:
                passes.pop()  # it made no node: there was no gradient
            passes.append(moment)

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
        if torch.compiler.is_compiling() or _place() is None:
            before = self._own()
            self.set(t)
            try:
                yield
            finally:
                self._finish()
                self.set(before)
            return

        # While a block is computed again, the time step of its forward pass comes back.
        thread = threading.get_ident()
        again, before = self._again.pop(thread, None), self._t
        self.set(t)
        try:
            yield
        finally:
            self._again.pop(thread, None)
            if again is not None:
                self._again[thread] = again
            self._t, self.kept = before, None
            self.version += 1

    def _own(self) -> Tensor | None:
        """Return this thread's time step outside of a backward pass, or None if none is set."""
        if torch.compiler.is_compiling() or self._unnoted:
            return self._t
        moment = self._now.get(threading.get_ident(), self._last)
        return None if moment is None else moment.t

    def _finish(self) -> None:
        """Note that what this thread computes next is of no forward pass."""
        if torch.compiler.is_compiling() or _place() is not None:
            return
        moment = self._now.get(threading.get_ident())
        if moment is not None:
            moment.finish()

    def follow(self, net: nn.Module) -> None:
        """Make the root forward of `net(x, t, ...)` set the time step, and keep it in float32.

        The hook is a bound method, so a deep copy of the network gets a hook bound to the copied
        context.
        """
        net.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        net.register_forward_hook(self._after_forward)
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

    def _after_forward(self, net: nn.Module, args: object, output: object) -> None:
        self._finish()
