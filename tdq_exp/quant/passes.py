"""Which forward pass it is, also where a block of an earlier one is computed again.

Threads may share a network, and a block that is computed again in the backward pass
(`torch.utils.checkpoint`) needs the time step of its own forward pass, whatever passes came after
it. Autograd numbers its nodes in the order of their creation, thread by thread, so the number of
the node whose gradient is being computed tells in which pass it was made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

PASSES = 1024  # of each thread, whose blocks may still be computed again

# (backward pass, node) while autograd computes the gradient of a node
Place = tuple[int, int]


def place() -> Place | None:
    """Return where in a backward pass this is, or None outside of any."""
    node = torch._C._current_autograd_node()
    return None if node is None else (torch._C._current_graph_task_id(), node._sequence_nr())


def backward_of_its_own() -> Place | None:
    """Return the place if a block has a backward pass of its own, else None.

    Such is torch's older kind of checkpoint: each block frees the graph of what it reads.
    """
    node = torch._C._current_autograd_node()
    return place() if node is not None and "CheckpointFunction" in node.name() else None


class Pass:
    """A time step, from when a thread sets it until it sets the next one. Compared by identity.

    Args:
        t: the time step.
    """

    def __init__(self, t: Tensor) -> None:
        self.t = t
        self.index: int | None = None  # t as a number, once it was read

        # Who drew random numbers for what follows from t, and the generator's state before that.
        self.drawn: tuple[object, Tensor] | None = None

        # Nodes of autograd from `start` on were made in it, up to `end`.
        self.start = torch.autograd._get_sequence_nr()
        self.end: int | None = None
        self.place = place()  # where a block that is computed again set it

    def finish(self) -> None:
        """Note that the forward pass is over."""
        self.end = torch.autograd._get_sequence_nr()

    def made(self, node: int) -> bool:
        """Return whether a node of the same thread was made in it, by the node's number."""
        return self.start <= node and (self.end is None or node < self.end)


class Passes:
    """The passes of one network, by thread."""

    def __init__(self) -> None:
        self.of_thread: dict[int, deque[Pass]] = {}  # the last ones that have a gradient
        self._last: Pass | None = None  # of any thread
        self._now: dict[int, Pass | None] = {}
        self._again: dict[int, Pass] = {}  # of the block that a thread computes again

    def begin(self, t: Tensor | None) -> None:
        """Begin a pass of this thread, or none; in a backward pass it is that of one block."""
        thread, begun = threading.get_ident(), None if t is None else Pass(t)
        if place() is not None:
            if begun is not None:
                self._again[thread] = begun
            return

        self._last = self._now[thread] = begun
        self._again.clear()
        if begun is not None:
            passes = self.of_thread.setdefault(thread, deque(maxlen=PASSES))
            if passes and passes[-1].start == begun.start:
                passes.pop()  # it made no node: there was no gradient
            passes.append(begun)

    def finish(self) -> None:
        """End this thread's forward pass: what it computes next does not belong to it."""
        begun = self._now.get(threading.get_ident())
        if begun is not None and place() is None:
            begun.finish()

    def own(self) -> Pass | None:
        """Return this thread's pass, or the last one of any thread if it has none.

        Backward passes are not considered; see `current`.
        """
        return self._now.get(threading.get_ident(), self._last)

    def current(self) -> Pass | None:
        """Return this thread's pass, or in a backward pass that of the block computed again.

        Raises:
            RuntimeError: if it can't be told.
        """
        here = place()
        if here is None:
            return self.own()

        # Begun in the backward pass itself, or that of the forward pass.
        thread = threading.get_ident()
        again = self._again.get(thread)
        if again is not None and again.place == here:
            return again
        found = self._of_node(here[1], again)
        if found is not None:
            self._again[thread] = found
        return found

    @contextmanager
    def within_block(self) -> Iterator[None]:
        """Let a pass that is begun within a block that is computed again end with this context."""
        thread = threading.get_ident()
        again = self._again.pop(thread, None)
        try:
            yield
        finally:
            self._again.pop(thread, None)
            if again is not None:
                self._again[thread] = again

    def _of_node(self, node: int, again: Pass | None) -> Pass | None:
        """Return the pass in which a node of autograd was made.

        Args:
            node: its number.
            again: that of the block which was last computed again in this thread.

        Raises:
            RuntimeError: if it can't be told.
        """
        # Each thread counts for itself, and which of them made the node is not known.
        latest = []
        for passes in list(self.of_thread.values()):
            before = (one for one in reversed(passes) if one.start <= node)
            latest += list(islice(before, 1))
        found = [one for one in latest if one.made(node)]

        # Made while this thread computed a block again, which set a time step of its own.
        if not found and again is not None and again.place is not None and again.made(node):
            return again

        # Made by a part of the network after a pass, or by a block within one.
        if not found:
            found = list(dict.fromkeys([*latest, *([] if again is None else [again])]))
        if not found:
            return self.own()

        if len(found) > 1:
            raise RuntimeError(
                "a block is computed again in the backward pass, and which time step it had can't"
                " be told: put no checkpoint within another one, call parts of the network within"
                " `with time.at(t):`, and give each thread a copy of the network (copy.deepcopy)"
            )
        return found[0]
