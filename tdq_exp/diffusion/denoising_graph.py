"""DDIM whose whole denoising step, network and update, is launched as one CUDA graph.

A step reads its number i from the GPU, and with it t and the coefficients of the update from
tables; its last act is to count i up. So all steps are the same recording, and between two of them
the host does nothing but launch the next one. Step sizes and zero points that depend on t are
gathered by the quantizers at that same t, on the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tdq_exp.diffusion.ddim import Ddim, as_table
from tdq_exp.diffusion.objective import ConditionedPredictor, NoisePredictor
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.runtime.graphs import Recorded, UnusableDevice, free_memory, records


class DenoisingGraph:
    """Sampling with the call of `Ddim.sample`, and its bits; without a GPU, `Ddim.sample` itself.

    The recording is kept for the next batch: of one shape, by an equal `denoise`. A condition is
    copied into a tensor that the recording reads, so that each batch may have its own.

    Args:
        ddim: the sampler to follow.
    """

    def __init__(self, ddim: Ddim) -> None:
        self.ddim = ddim
        self._key: object = None
        self._steps: RecordedSteps | None = None
        self._condition: Tensor | None = None  # that the recording reads

    @torch.no_grad()
    def sample(
        self,
        denoise: NoisePredictor,
        x: Tensor,
        schedule: Schedule,
        generators: Sequence[torch.Generator] = (),
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Follow the trajectory from pure noise to a sample. Arguments as `Ddim.sample`."""
        if not records(x.device):
            return self.ddim.sample(denoise, x, schedule, generators, on_step)

        denoise = self._with_own_condition(denoise, x.device)
        key = (denoise, schedule, x.shape, x.dtype, x.device)
        if self._key != key:
            self._forget()
            self._steps = _recorded(self.ddim, denoise, x, schedule)
            self._key = key
        if self._steps is None:
            return self.ddim.sample(denoise, x, schedule, generators, on_step)
        return self._steps.run(x, generators, on_step)

    def _with_own_condition(self, denoise: NoisePredictor, device: torch.device) -> NoisePredictor:
        """Return a predictor with the same condition, in the tensor that a recording reads."""
        if not isinstance(denoise, ConditionedPredictor) or denoise.condition is None:
            return denoise

        theirs, mine = denoise.condition, self._condition
        if mine is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            self._condition = mine = theirs.to(device, copy=True)
        else:
            mine.copy_(theirs)
        return denoise.conditioned(mine, device)

    def _forget(self) -> None:
        """Free the recording: a batch of another kind needs its memory."""
        if self._steps is not None:
            self._steps.step.release()
        self._key = self._steps = None


def _recorded(
    ddim: Ddim, denoise: NoisePredictor, x: Tensor, schedule: Schedule
) -> RecordedSteps | None:
    steps = RecordedSteps(ddim, denoise, x, schedule)
    try:
        steps.record()
    except (torch.OutOfMemoryError, UnusableDevice):
        raise  # launched singly it would want as much memory
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"sampling step by step: no CUDA graph of this network ({reason})", stacklevel=3
        )
        return None
    return steps


class StepTensors(NamedTuple):
    """What a recorded step reads and writes, where x is.

    Args:
        x: x_t, `[B, C, H, W]`; the step writes x_{t_prev}.
        i: number of the step, `[1]`; the step counts it up.
        t: the time steps, `[S]`.
        table: the numbers of their updates, `[S, 5]`.
        z: standard normal of x's shape; None if no step adds noise.
    """

    x: Tensor
    i: Tensor
    t: Tensor
    table: Tensor
    z: Tensor | None


class RecordedSteps:
    """The tensors of a recording, and the function that is recorded.

    Args: as `Ddim.sample`; x gives shape, type and device.
    """

    def __init__(self, ddim: Ddim, denoise: NoisePredictor, x: Tensor, schedule: Schedule) -> None:
        self.ddim = ddim
        trajectory = ddim.trajectory(denoise, schedule)
        self.visited = [t for t, _ in trajectory]
        self.sigmas = [values.sigma for _, values in trajectory]

        # Made where x is; from here on nothing is copied from the host but the noise of eta > 0.
        self.x, self.z = x.clone(), torch.zeros_like(x) if any(self.sigmas) else None
        self.i = torch.zeros(1, dtype=torch.long, device=x.device)
        t = torch.tensor(self.visited, device=x.device)
        tensors = StepTensors(self.x, self.i, t, as_table(trajectory, x), self.z)
        self.step = Recorded(partial(_advance, ddim, denoise, tensors), x.device)

    def record(self) -> None:
        """Record the step."""
        free_memory(self.x.device)
        self.step.prepare()
        self.i.zero_()
        self.step.record()

    def run(
        self,
        x: Tensor,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """Return x_0 of a batch of x_T."""
        self.x.copy_(x)
        self.i.zero_()
        for t, sigma in zip(self.visited, self.sigmas, strict=True):
            if on_step is not None:
                on_step(t, self.x.clone())
            if self.z is not None and sigma > 0:
                self.z.copy_(self.ddim.noise(self.x, generators))
            self.step()
        return self.x.clone()


def _advance(ddim: Ddim, denoise: NoisePredictor, tensors: StepTensors) -> Tensor:
    """Take x_t to x_{t_prev} in place, at the step whose number is on the GPU."""
    x, i, steps, table, z = tensors
    number = i.clamp(max=len(steps) - 1)  # the warm-up may count past the end
    t = steps.index_select(0, number).reshape(())
    values = table.index_select(0, number).reshape(-1).unbind()

    eps = denoise(x, t).to(x.dtype)
    x.copy_(ddim.update(eps, x, values, z))
    i.add_(1)
    return x
