"""Loss and gradients of a batch, launched as one CUDA graph.

A quantized network launches thousands of small operations in a training step; a GPU is done with
them sooner than Python can launch them. Recorded once, they are launched by one call. Only for
batches of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from tdq_exp.quant.intervals.base import bank_of
from tdq_exp.runtime.graphs import Recorded, free_memory


class TrainingGraph:
    """Forward and backward pass of a batch.

    Gradients are written anew by each call, into the same tensors: never set them to None in
    between. Dropout and noise are drawn anew by each call, from the device's generator, whose state
    a recording leaves as it was. What is fixed while recording is whatever the host decides: for a
    new phase of training, make a new graph.

    Args:
        net: in training mode, on the device.
        backward: adds the gradients of a batch's loss to the parameters, and returns the loss,
            penalties and autocast included.
        batch: an example, on the device.

    Raises:
        RuntimeError: if the pass waits for the device, or can't be recorded.
    """

    def __init__(
        self, net: nn.Module, backward: Callable[..., Tensor], batch: Sequence[Tensor]
    ) -> None:
        self.inputs = [tensor.clone() for tensor in batch]
        parameters = [p for p in net.parameters() if p.requires_grad]

        # A graph of an earlier pass would tie the gradients of its leaves to another stream.
        bank = bank_of(net)
        if bank is not None:
            bank.forget()

        # Gradients of an earlier recording lie in its memory.
        device = self.inputs[0].device
        for parameter in parameters:
            parameter.grad = None
        free_memory(device)

        self.step = Recorded(partial(_pass, parameters, backward, self.inputs), device)
        self.step.prepare()
        self.step.record()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Return the loss, which the next call overwrites; the gradients are in the parameters.

        Copies from pinned memory do not wait.
        """
        for mine, theirs in zip(self.inputs, batch, strict=True):
            mine.copy_(theirs, non_blocking=True)
        return self.step()

    def release(self) -> None:
        """Free the recording with its memory; see `Recorded.release`."""
        self.step.release()


def _pass(
    parameters: Sequence[nn.Parameter], backward: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Write the gradients of a batch; return its loss."""
    for parameter in parameters:
        parameter.grad = None  # so that each pass writes, and does not add
    return backward(*inputs)
