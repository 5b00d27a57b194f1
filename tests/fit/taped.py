"""A stand-in for CUDA graphs on a CPU: operations written down once, and run again on the same tensors.

As on a GPU, numbers of the host are those of the recording, results lie where they lay, recording
computes nothing, and what reads a number from the device can't be recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdq_exp.diffusion import denoising_graph
from tdq_exp.fit import gradients, training_graph, weight_update
from tdq_exp.runtime.graphs import Recorded


class Tape(TorchDispatchMode):
    """Writes down every operation, and what tensors held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage
        self.made: set[int] = set()  # storages

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("called a synchronizing operation")

        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            place = _place(tensor)
            if place not in self.made and place not in self.before:
                whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
                self.before[place] = whole, whole.clone()

        result = function(*args, **kwargs)
        self.made |= {_place(t) for t in _tensors(result)} - self.before.keys()
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Put back what was there before."""
        for tensor, content in self.before.values():
            tensor.copy_(content)

    def play(self) -> None:
        """Run everything again; results go to where they lay."""
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if _place(old) != _place(new):
                    old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Taped(Recorded[Any]):
    """`Recorded` with a tape in place of a graph."""

    tape: Tape | None = None

    # Of all, for tests.
    replays = released = 0
    alive: weakref.WeakSet[Tape] = weakref.WeakSet()
    others: list[int] = []  # recordings that were alive when one was begun

    def prepare(self) -> None:
        self._generator = torch.get_rng_state()
        for _ in range(self._warm_up):
            self._function()

    def record(self) -> None:
        Taped.others.append(len(Taped.alive))
        tape = Tape()
        try:
            with tape:
                self._result = self._function()
        finally:
            with torch.no_grad():
                tape.undo()
            if hasattr(self, "_generator"):
                torch.set_rng_state(self._generator)
        self.tape = tape
        Taped.alive.add(tape)

    def release(self) -> None:
        self.tape = None
        Taped.released += 1
        super().release()

    @torch.no_grad()
    def __call__(self) -> Any:
        assert self.tape is not None, "not recorded, or released"
        self.tape.play()
        Taped.replays += 1
        return self._result


def record_on_tape(monkeypatch: Any) -> None:
    """Let the loop, and sampling, believe that they compute on a device that records."""
    yes: Callable[[torch.device], bool] = lambda device: True  # noqa: E731
    for module in (gradients, weight_update, denoising_graph):
        monkeypatch.setattr(module, "records", yes)
    for module in (training_graph, weight_update, denoising_graph):
        monkeypatch.setattr(module, "Recorded", Taped)
    for count in ("replays", "released"):
        monkeypatch.setattr(Taped, count, 0)
    monkeypatch.setattr(Taped, "alive", weakref.WeakSet())
    monkeypatch.setattr(Taped, "others", [])
