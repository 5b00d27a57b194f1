"""The processes that share a run: the only importer of accelerate.

Every stage takes a `Processes` and never names a device or a backend. With one process all of it is
trivial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from tdq_exp.runtime import launch, shared_error

T = TypeVar("T")

# How long the others wait for what one process decides: decoding, downloads, distances.
PATIENCE = timedelta(hours=6)


class Processes:
    """Rank, device and the few collectives that this project needs.

    Args:
        cpu: stay on the CPU although a GPU is there.
        threads: of torch in this process; 0 leaves its default.
    """

    def __init__(self, cpu: bool = False, threads: int = 0) -> None:
        # Without a GPU, too, accelerate makes one group of several processes only if it is told to
        # stay on the CPU. Each would do all of the work by itself.
        self._accelerator = Accelerator(
            cpu=cpu or not launch.gpus(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )

        # Last: of several processes on a CPU, accelerate gives each a share of the cores where
        # OMP_NUM_THREADS is not set. Last bits depend on the number.
        if threads:
            torch.set_num_threads(threads)

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self._accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and decides."""
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    @torch.no_grad()
    def share(self, net: nn.Module) -> None:
        """Give every process the parameters of the main one."""
        if self.world > 1:
            parameters: list[Tensor] = list(net.parameters())
            _scatter(broadcast(_gather(parameters)), parameters)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over processes, in one message.

        Unlike DistributedDataParallel it takes gradients as they are, so that the backward pass may
        be one recording.

        Args:
            parameters: the same on all processes; those without a gradient are left out.
        """
        if self.world > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            _scatter(self.mean(_gather(gradients)), gradients)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over processes of a tensor of the same shape on each."""
        return self._accelerator.reduce(value, reduction="mean") if self.world > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over processes of a tensor of the same shape on each."""
        return self._accelerator.reduce(value, reduction="sum") if self.world > 1 else value

    def random_state(self) -> list[Tensor]:
        """Return the states of the global generators, from which dropout and noise are drawn.

        The CPU's, and the device's if it is another one.
        """
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state())
        return states

    def set_random_state(self, states: list[Tensor]) -> None:
        """Restore what `random_state` returned."""
        torch.set_rng_state(states[0])
        if self.device.type != "cpu" and len(states) > 1:
            torch.get_device_module(self.device).set_rng_state(states[1])

    def gather_objects(self, value: T) -> list[T]:
        """Return one small object from every process, in rank order, on all of them."""
        return list(gather_object([value])) if self.world > 1 else [value]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Let processes work apart within the `with` block, and wait for each other at its end.

        Raises:
            OSError: on every process, the first that one of them met, such as a full disk: if it
                ended alone, the others would wait for ever.
        """
        met: OSError | None = None
        try:
            yield
        except OSError as error:
            met = error

        # The main process prints it for all.
        for first in self.gather_objects(met):
            if first is not None:
                shared_error.share(first, printed=not self.main)
                raise first

    def decide(self, ask: Callable[[], T]) -> T:
        """Call `ask` on the main process only, and return its answer, or raise its error, on all.

        What may refuse must be decided here: if one process raised alone, the others would wait for
        ever.

        Raises:
            Exception: whatever `ask` raised, on every process.
        """
        answer: list[object] = [None, None]
        if self.main:
            try:
                answer[0] = ask()
            except Exception as error:  # handed to every process, and raised there
                answer[1] = error
        if self.world > 1:
            broadcast_object_list(answer)
        if isinstance(answer[1], Exception):
            # The main process prints it for all.
            shared_error.share(answer[1], printed=not self.main)
            raise answer[1]
        return answer[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Free what accelerate keeps for the interpreter: the next job of a sweep starts anew."""
        alone = self.world == 1  # a process group outlives the job: the next one joins it again
        self._accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=alone)


def _gather(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of all tensors, one after another."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _scatter(elements: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the elements back into the tensors that they were gathered from."""
    parts = elements.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
