"""CUDA graphs: a whole step of work launched by one call."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

# Other threads (copies of batches, a process group's watchdog) may go on calling the driver.
MODE = "thread_local"


def records(device: torch.device) -> bool:
    """Return whether work on a device can be recorded."""
    return device.type != "cpu" and torch.cuda.is_available()


class UnusableDevice(RuntimeError):
    """A recording failed, and left the device in a state in which nothing can go on."""


class Recorded(Generic[T]):
    """A function without arguments, recorded once and replayed at each call.

    What it reads and writes stays where it was while recording: put new inputs into the same
    tensors, and read results from the tensors that it returned. It must not wait for the GPU, nor
    depend on numbers that change on the host. On a CPU there is nothing to record: each call runs
    the function.

    What the function draws from the device's generator is drawn anew by each call. Warm-up and
    recording leave the generator as it was, so that work that is resumed goes on with its numbers.

    A recording keeps the memory of all that the function computes, and the function with all that
    it reads. Call `release` before the next recording, and when the work is done: if the function
    is a method of whoever holds the recording, each keeps the other alive.

    Args:
        function: the step; called `warm_up` times before it is recorded, so that whatever is made
            at first use (compiled kernels, workspaces, weights from codes) exists by then. One that
            changes what it reads is warmed up by `run_once`.
        device: where it computes.
        warm_up: number of those calls.
    """

    def __init__(self, function: Callable[[], T], device: torch.device, warm_up: int = 2) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T | None = None
        self._warm_up = warm_up
        self._random: Tensor | None = None  # the generator's state before the warm-up
        # One stream for warm-up and recording: autograd adds gradients up on the stream that it
        # first saw.
        self._stream = torch.cuda.Stream(device) if records(device) else None

    def prepare(self) -> None:
        """Run the warm-up; the caller puts changed inputs back before `record`.

        Raises:
            RuntimeError: if the function waits for the GPU.
        """
        side = self._stream
        if side is None:
            return
        self._random = torch.cuda.get_rng_state(self._device)
        try:
            self._warm_up_on(side)
        except RuntimeError:
            self._put_generator_back()
            raise

    def run_once(self) -> str | None:
        """Run the function once, launched singly, as the warm-up of one that changes what it reads.

        Returns:
            What waited for the GPU, or None; the function has run to its end either way.
        """
        if self._stream is None:
            self._function()
            return None

        # A warning and no error: half of a step could not be taken back.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                self._function()
        finally:
            torch.cuda.set_sync_debug_mode(before)

        waits = [str(one.message) for one in seen if "synchroniz" in str(one.message)]
        return waits[0] if waits else None

    def _warm_up_on(self, side: torch.cuda.Stream) -> None:
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(self._warm_up):
                self._function()
            torch.cuda.synchronize(self._device)
            self._run_without_waiting()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)

    def _run_without_waiting(self) -> None:
        """Run the function once more, and fail if it waits: a recording would break the context.

        Raises:
            RuntimeError: if it does.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._function()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self) -> None:
        """Record the function. Nothing is computed: the first call does that.

        Raises:
            RuntimeError: the first error, if it can't be recorded; work can go on without.
            UnusableDevice: if that left the device in a state in which it can't.
        """
        side = self._stream
        if side is None:
            return

        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        before = torch.cuda.current_stream(self._device)
        first: Exception | None = None
        try:
            with no_collection(), torch.cuda.graph(graph, pool, side, MODE):
                try:
                    self._result = self._function()
                except Exception as error:
                    first = error  # the end of the recording may raise another one
                    raise
        except Exception as last:
            self._result = None
            self._clean_up(before, pool, first or last)
            raise (first or last) from None
        finally:
            first = None  # its frames hold this one

        self._graph = graph
        self._put_generator_back()

    def _clean_up(self, before: torch.cuda.Stream, pool: Any, cause: Exception) -> None:
        """End what a failed recording began, and make sure that the device can be used.

        If the driver calls a recording invalid, torch leaves the side stream current, the allocator
        recording, and the generator counting as if it still were.

        Raises:
            UnusableDevice: if the device can't be used.
        """
        torch.cuda.set_stream(before)
        index = self._device.index
        index = torch.cuda.current_device() if index is None else index
        with suppress(RuntimeError):  # if torch ended it
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)

        # The end of a recording that succeeds sets the generator right.
        try:
            count = torch.zeros((), device=self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=MODE):
                count.add_(1)
            graph.replay()
            usable = float(count) == 1
        except RuntimeError:
            usable = False
        if not usable:
            torch.cuda.set_stream(before)
            reason = (str(cause).strip().splitlines() or [""])[0]
            raise UnusableDevice(
                f"the GPU can't be used after a CUDA graph that failed ({reason}); run the same"
                " command again"
            ) from cause
        self._put_generator_back()

    def release(self) -> None:
        """Free the recording with its memory; it can't be called any more."""
        if self._graph is not None:
            # What a replay reads is freed, too. An error of the device stays for its next use.
            with suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
        self._graph = self._result = None
        self._function = _released

    def _put_generator_back(self) -> None:
        if self._random is not None:
            torch.cuda.set_rng_state(self._random, self._device)

    def __call__(self) -> T:
        """Run the step; the result is overwritten by the next call."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return cast(T, self._result)


def free_memory(device: torch.device) -> None:
    """Give memory that nobody uses back to the driver, garbage included: a recording takes much."""
    if records(device):
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage within the block.

    A graph that is destroyed while another one is recorded makes that one invalid.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _released() -> Any:
    raise RuntimeError("a recording that was released can't be called")
