"""Batches prepared ahead of the GPU that consumes them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


def batches_ahead(
    make: Callable[[int], Batch], first: int, end: int, device: torch.device, depth: int = 3
) -> Generator[Batch, None, None]:
    """Yield `make(update)` for update = first..end - 1, on the device.

    For a GPU, one thread makes the batches that come next, in order, into pinned memory, from which
    they are copied without waiting. For a CPU each is made when it is asked for: the thread would
    take the time from the network. The numbers are the same either way, if `make` depends on the
    update alone.

    Args:
        make: the batch of an update, on the CPU; it must not draw from global generators.
        first, end: updates, the last one excluded.
        device: where they are wanted.
        depth: batches that may wait.

    Raises:
        Exception: whatever `make` raised, at that update.
    """
    if device.type == "cpu":
        for update in range(first, end):
            yield make(update)
        return

    # A copy from pinned memory takes its turn on the GPU, and the host does not wait for it.
    def pinned(update: int) -> Batch:
        return tuple(tensor.pin_memory() for tensor in make(update))

    with ThreadPoolExecutor(1, "batches ahead") as pool:
        waiting: list[Future[Batch]] = []
        try:
            for update in range(first, end):
                while len(waiting) < depth and update + len(waiting) < end:
                    waiting.append(pool.submit(pinned, update + len(waiting)))

                batch = waiting.pop(0).result()
                yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        finally:
            for future in waiting:  # the loop was left early
                future.cancel()
