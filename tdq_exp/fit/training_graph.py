"""Loss and gradients of a batch, launched as one CUDA graph.

A quantized network launches thousands of small operations in a training step; at reduced precision
a GPU is done with them sooner than Python can launch them. Recorded once, they are launched by one
call. Only for one process, and for batches of one shape.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tdq_exp.quant.intervals.temporal import GeneratorBank
from tdq_exp.runtime.graphs import Recorded

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class TrainingGraph:
    """Forward and backward pass of a batch.

    Gradients are written anew by each call, into the same tensors: never set them to None in
    between. Dropout and noise are drawn anew by each call, from the device's generator. What is
    fixed while recording is whatever the host decides: for a new phase of training, make a new
    graph.

    Args:
        net: in training mode, on the device.
        loss: of (x_0, t, eps); penalties and autocast included.
        x_0, t, eps: an example of a batch, on the device.
    """

    def __init__(self, net: nn.Module, loss: Loss, x_0: Tensor, t: Tensor, eps: Tensor) -> None:
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.loss = loss
        self.inputs = x_0.clone(), t.clone(), eps.clone()

        # A graph of an earlier pass would tie the gradients of its leaves to another stream.
        for module in net.modules():
            if isinstance(module, GeneratorBank):
                module.forget()

        self.step = Recorded(self._backward, x_0.device)
        self.step.prepare()
        self.step.record()

    def __call__(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the loss, which the next call overwrites; the gradients are in the parameters.

        Copies from pinned memory do not wait.
        """
        for mine, theirs in zip(self.inputs, (x_0, t, eps), strict=True):
            mine.copy_(theirs, non_blocking=True)
        return self.step()

    def _backward(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None  # so that each pass writes, and does not add
        loss = self.loss(*self.inputs)
        loss.backward()
        return loss.detach()
