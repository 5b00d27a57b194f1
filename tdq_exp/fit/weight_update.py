"""What an update does with the gradients: clip them, step the optimiser, follow with the average.

On a GPU this is one CUDA graph, beside that of the gradients (`fit.training_graph`): hundreds of
parameters are scalars, and the host would take longer to name them than the GPU to change them.
Numbers that change from update to update (learning rates, the average's weight) lie on the device
and are filled in before, so that a schedule needs no new recording. Between both graphs processes
average their gradients.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from tdq_exp.fit.ema import Ema
from tdq_exp.runtime.graphs import Recorded, UnusableDevice, records

# How the optimiser launches its work: a matter of the device, and not of a saved state.
LAUNCH = ("fused", "foreach", "capturable")


class WeightUpdate:
    """Clips gradients, steps the optimiser, and takes the weights into their average.

    Args:
        net: in training form, on the device.
        optimizer: Adam or AdamW over its parameters; its groups' `lr` are the rates after warm-up.
            On a GPU it is made fused and capturable.
        ema: the average of the network.
        grad_clip: largest norm of the gradient; 0 does not clip.
        device: where the network is.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        grad_clip: float,
        device: torch.device,
    ) -> None:
        self.optimizer, self.ema, self.grad_clip = optimizer, ema, grad_clip
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.rates_now = list(self.rates)

        self._device, self._number = device, 0
        self._parameters = list(net.parameters())
        self._graph: Recorded[None] | None = None
        self._on_device = self._records = records(device)
        if self._on_device:
            self._move_numbers()

    def __call__(self, update: int, share: float, fixed: bool) -> None:
        """Make the update of the gradients that the parameters hold.

        Args:
            update: its number, counted from 0.
            share: of the learning rates, in (0, 1].
            fixed: whether gradients lie in the same tensors at every call; else nothing is
                recorded.
        """
        self._set_numbers(update, share)
        if self._graph is not None:
            self._graph()
        elif self._records and fixed:
            self._record()
        else:
            self._step()

    @property
    def recorded(self) -> bool:
        """Whether there is a recording, which the next call replays."""
        return self._graph is not None

    def forget(self) -> None:
        """Free the recording: the gradients are about to lie elsewhere."""
        if self._graph is not None:
            self._graph.release()
        self._graph = None

    def rates_by_name(self) -> dict[str, float]:
        """Return the learning rate of each group in the last update."""
        names = [str(g.get("name", i)) for i, g in enumerate(self.optimizer.param_groups)]
        return dict(zip(names, self.rates_now, strict=True))

    # --- The state, the same on every device

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, with learning rates as numbers."""
        state = self.optimizer.state_dict()
        groups = zip(state["param_groups"], self.rates_now, strict=True)
        return {**state, "param_groups": [{**group, "lr": rate} for group, rate in groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back the optimiser's state, written on any device; it launches its work as here.

        Raises:
            ValueError: if it is of other parameters.
        """
        mine, theirs = self.optimizer.param_groups, state["param_groups"]
        if len(mine) == len(theirs):  # torch refuses another number of groups
            launch = [{key: group[key] for key in LAUNCH if key in group} for group in mine]
            theirs = [{**a, **b} for a, b in zip(theirs, launch, strict=True)]

        self.optimizer.load_state_dict({**state, "param_groups": theirs})
        if self._on_device:
            self._move_numbers()

    # --- Numbers that change from update to update

    def _move_numbers(self) -> None:
        """Let the optimiser and the average read their numbers from the device."""
        self._weight = torch.zeros((), device=self._device)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=self._device)
            group |= {"fused": True, "foreach": False, "capturable": True}

    def _set_numbers(self, update: int, share: float) -> None:
        self._number = update
        self.rates_now = [rate * share for rate in self.rates]
        for group, rate in zip(self.optimizer.param_groups, self.rates_now, strict=True):
            if self._on_device:
                group["lr"].fill_(rate)  # does not wait: the number travels with the launch
            else:
                group["lr"] = rate
        if self._on_device:
            self._weight.fill_(self.ema.weight(update))

    # --- The work

    def _step(self) -> None:
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self._parameters, self.grad_clip)
        self.optimizer.step()

        if self._on_device:
            self.ema.blend(self._weight)
        else:
            self.ema.update(self._number)

    def _record(self) -> None:
        """Make this update launched singly, then record it for the next ones, or say why not."""
        graph = Recorded(self._step, self._device)
        waits = graph.run_once()
        if waits is not None:
            self._never_record(waits)
            return

        try:
            graph.record()
        except (torch.OutOfMemoryError, UnusableDevice):
            raise
        except RuntimeError as error:
            self._never_record((str(error).strip().splitlines() or [""])[0])
        else:
            self._graph = graph

    def _never_record(self, reason: str) -> None:
        self._records = False
        warnings.warn(
            "training launches the optimiser's operations one by one, which takes longer: no CUDA"
            f" graph of its step ({reason})",
            stacklevel=4,
        )
