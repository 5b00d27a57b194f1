"""Recordings: what they keep, how they are freed, and what is left of one that fails."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tdq_exp.runtime import graphs
from tdq_exp.runtime.graphs import Recorded, UnusableDevice

CPU = torch.device("cpu")


class Card:
    """A stand-in for a GPU: what torch 2.11 keeps while it records, and leaves behind if that fails.

    Attributes:
        invalid: the driver refuses the recording at its end.
        broken: it can't do anything any more.
        events: what was done, in order.
    """

    def __init__(self) -> None:
        self.stream, self.pools, self.counting = "default", set(), False
        self.invalid = self.broken = False
        self.events: list[str] = []

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: Any = ""):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        assert not self.pools, "captures_underway.empty() INTERNAL ASSERT FAILED"
        before, self.stream, self.counting = self.stream, "side", True
        self.pools.add(pool)
        try:
            yield
        finally:
            if self.invalid:
                self.invalid = False
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            self.pools.remove(pool)
            self.stream, self.counting = before, False

    def replay(self) -> None:
        assert not self.counting, "Offset increment outside graph capture encountered unexpectedly."
        self.events.append("replay")

    def end(self, index: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


@pytest.fixture
def card(monkeypatch) -> Card:
    """Recordings on a CPU believe in it; a recorded function runs when it is recorded."""
    card = Card()

    class Graph:
        replay = staticmethod(card.replay)

        def __del__(self) -> None:
            card.events.append("destroyed")

    monkeypatch.setattr(graphs, "records", lambda device: True)
    for name, value in {
        "Stream": lambda device: "side", "CUDAGraph": Graph, "graph": card.graph,
        "graph_pool_handle": lambda: (0, 7), "current_device": lambda: 0,
        "current_stream": lambda device: card.stream,
        "set_stream": lambda stream: setattr(card, "stream", stream),
        "synchronize": lambda device: card.events.append("synchronized"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", card.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: None, raising=False)
    return card


class Owner:
    """Whoever holds a recording of its own method."""

    def __init__(self) -> None:
        self.step = Recorded(self.work, CPU)
        self.collects: list[bool] = []

    def work(self) -> str:
        """Note whether garbage may be collected."""
        self.collects.append(gc.isenabled())
        return "done"


def test_a_recording_keeps_what_it_reads_until_it_is_released(card):
    with graphs.no_collection():
        owner = Owner()
        step, seen = owner.step, weakref.ref(owner)
        step.record()
        del owner
        assert step() == "done" and seen() is not None

        step.release()
        assert seen() is None and card.events == ["replay", "synchronized", "destroyed"]


def test_garbage_is_not_collected_while_recording(card):
    assert gc.isenabled()
    owner = Owner()
    owner.step.record()
    assert owner.collects == [False] and gc.isenabled()


def test_what_is_released_has_been_waited_for_and_is_gone(card):
    owner = Owner()
    owner.step.record()
    owner.step.release()
    assert card.events == ["synchronized", "destroyed"]
    with pytest.raises(RuntimeError, match="was released"):
        owner.step()


@pytest.mark.parametrize("invalid", [True, False])
def test_after_a_recording_that_fails_the_next_one_works(card, invalid):
    """The first error is the cause, whatever the end of the recording says."""

    def fail() -> None:
        card.invalid = invalid
        raise torch.OutOfMemoryError("no memory\nand more")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Recorded(fail, CPU).record()
    assert card.stream == "default" and not card.pools and not card.counting

    owner = Owner()
    owner.step.record()
    assert owner.step() == "done"


def test_an_error_of_the_end_alone_is_the_cause(card):
    def wait() -> None:
        card.invalid = True

    with pytest.raises(RuntimeError, match="due to a previous error"):
        Recorded(wait, CPU).record()
    assert card.stream == "default" and not card.pools and not card.counting


def test_a_device_that_can_not_be_used_any_more_ends_the_work(card):
    def fail() -> None:
        card.invalid = card.broken = True
        raise RuntimeError("CUDA error: misaligned address\nand more")

    with pytest.raises(UnusableDevice, match=r"can't be used .*misaligned address\); run the same"):
        Recorded(fail, CPU).record()


# --- What only a GPU has


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_recording_that_fails():
    device = torch.device("cuda")
    x, before = torch.zeros(3, device=device), torch.cuda.current_stream()

    def waits() -> torch.Tensor:
        x.add_(torch.rand(3, device=device))
        torch.cuda.synchronize()  # not allowed within a recording
        return x

    torch.cuda.manual_seed(3)
    wanted = torch.rand(3, device=device)
    torch.cuda.manual_seed(3)
    with pytest.raises(RuntimeError, match="(?i)captur"):
        Recorded(waits, device).record()

    # The stream, the allocator and the generator are as they were.
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    step = Recorded(lambda: x.add_(1), device)
    step.record()
    for _ in range(2):
        step()
    assert x.tolist() == [2, 2, 2]
    assert torch.equal(torch.rand(3, device=device), wanted)


@pytest.mark.gpu
def test_the_memory_of_a_recording_on_a_gpu_comes_back():
    device = torch.device("cuda")
    x = torch.ones(1 << 20, device=device)
    graphs.free_memory(device)
    before = torch.cuda.memory_reserved()

    step = Recorded(lambda: sum(x * float(i) for i in range(64)), device)
    step.prepare()
    step.record()
    step()
    assert torch.cuda.memory_reserved() > before
    step.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
