"""Loss and gradients of a batch, averaged over processes.

On a GPU the forward and the backward pass are launched as one CUDA graph (`fit.training_graph`);
where there is none, or the network can't be recorded, one operation after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tdq_exp.fit.training_graph import TrainingGraph
from tdq_exp.runtime.graphs import UnusableDevice, records
from tdq_exp.runtime.processes import Processes

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


class Gradients:
    """Computes the gradients of a batch's loss, averaged over processes, into the parameters.

    Each call overwrites the gradients of the one before instead of adding to them.

    Args:
        net: in training mode, on the processes' device; the same on all of them.
        loss: of the tensors of a batch, 0-dim: a mean over samples.
        processes: each calls with its part of the batch.
        micro_batches: equal passes into which a process splits its part. They save memory and give
            the same gradients up to summation order and to noise, which each pass draws anew.
    """

    def __init__(
        self, net: nn.Module, loss: Loss, processes: Processes, micro_batches: int = 1
    ) -> None:
        self.net, self.loss, self.processes = net, loss, processes
        self.micro_batches = micro_batches
        self._parameters = [p for p in net.parameters() if p.requires_grad]
        self._graph: TrainingGraph | None = None
        self._records = records(processes.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of this process' part; the next call overwrites it.

        Args:
            batch: this process' part, on the device, of the same shapes at every call.
        """
        if self._records and self._graph is None:
            self._record(batch)

        if self._graph is not None:
            loss = self._graph(*batch)
        else:
            loss = self.launch(batch)

        self.processes.average_gradients(self._parameters)
        return loss

    def launch(self, batch: Batch) -> Tensor:
        """Return the loss of this process' part; leave its own gradients, launched one by one."""
        for parameter in self._parameters:
            parameter.grad = None
        return _backward(self.loss, self.micro_batches, *batch)

    @property
    def recorded(self) -> bool:
        """Whether the gradients lie in the same tensors after every call."""
        return self._graph is not None

    def forget(self) -> None:
        """Free the recording: what the host decides is about to change, such as a phase."""
        if self._graph is not None:
            self._graph.release()
        self._graph = None

    def _record(self, batch: Batch) -> None:
        """Record a pass, or say why there is no recording."""
        backward = partial(_backward, self.loss, self.micro_batches)  # holds nothing of this object
        try:
            self._graph = TrainingGraph(self.net, backward, batch)
        except (torch.OutOfMemoryError, UnusableDevice):
            raise  # launched singly it would want as much memory
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            self._records = False
            warnings.warn(
                f"training launches its operations one by one, which may take several times as"
                f" long: no CUDA graph of this network ({reason})",
                stacklevel=3,
            )


def _backward(loss: Loss, micro_batches: int, *batch: Tensor) -> Tensor:
    """Add the gradients of a batch's loss to the parameters; return the loss."""
    parts: Sequence[Batch] = [batch]
    if micro_batches > 1:
        parts = list(zip(*(tensor.chunk(micro_batches) for tensor in batch), strict=True))

    shares = []
    for part in parts:
        share = loss(*part) / len(parts)
        share.backward()
        shares.append(share.detach())
    return torch.stack(shares).sum()
