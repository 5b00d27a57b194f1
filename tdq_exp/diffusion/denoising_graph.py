"""DDIM whose whole denoising step, network and update, is launched as one CUDA graph.

A step reads its number i from the GPU, and with it t and the coefficients of the update from
tables; its last act is to count i up. So all steps are the same recording, and between two of them
the host does nothing but launch the next one. Step sizes and zero points that depend on t are
gathered by the quantizers at that same t, on the GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tdq_exp.diffusion.ddim import Ddim, as_table
from tdq_exp.diffusion.objective import NoisePredictor
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.runtime.graphs import Recorded


class DenoisingGraph:
    """Sampling with the call of `Ddim.sample`, and its bits; without a GPU, `Ddim.sample` itself.

    The recording is kept for the next batch: of one shape, by an equal `denoise`.

    Args:
        ddim: the sampler to follow.
    """

    def __init__(self, ddim: Ddim) -> None:
        self.ddim = ddim
        self._key: object = None
        self._steps: RecordedSteps | None = None

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
        if not x.is_cuda:
            return self.ddim.sample(denoise, x, schedule, generators, on_step)

        key = (denoise, schedule, x.shape, x.dtype, x.device)
        if self._key != key:
            self._key, self._steps = key, _recorded(self.ddim, denoise, x, schedule)
        if self._steps is None:
            return self.ddim.sample(denoise, x, schedule, generators, on_step)
        return self._steps.run(x, generators, on_step)


def _recorded(
    ddim: Ddim, denoise: NoisePredictor, x: Tensor, schedule: Schedule
) -> RecordedSteps | None:
    steps = RecordedSteps(ddim, denoise, x, schedule)
    try:
        steps.record()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"sampling step by step: no CUDA graph of this network ({reason})", stacklevel=3
        )
        return None
    return steps


class RecordedSteps:
    """The tensors of a recording, and the function that is recorded.

    Args: as `Ddim.sample`; x gives shape, type and device.
    """

    def __init__(self, ddim: Ddim, denoise: NoisePredictor, x: Tensor, schedule: Schedule) -> None:
        self.ddim, self.denoise = ddim, denoise
        trajectory = ddim.trajectory(denoise, schedule)
        self.visited = [t for t, _ in trajectory]
        self.sigmas = [values.sigma for _, values in trajectory]

        # Made where x is; from here on nothing is copied from the host but the noise of eta > 0.
        self.t = torch.tensor(self.visited, device=x.device)
        self.table = as_table(trajectory, x)
        self.i = torch.zeros(1, dtype=torch.long, device=x.device)
        self.x = x.clone()
        self.z = torch.zeros_like(x) if any(self.sigmas) else None
        self.step = Recorded(self._advance, x.device)

    def record(self) -> None:
        """Record the step."""
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

    def _advance(self) -> Tensor:
        """x_t -> x_{t_prev} in place, at the step whose number is on the GPU."""
        number = self.i.clamp(max=len(self.visited) - 1)  # the warm-up may count past the end
        t = self.t.index_select(0, number).reshape(())
        values = self.table.index_select(0, number).reshape(-1).unbind()
        eps = self.denoise(self.x, t).to(self.x.dtype)
        self.x.copy_(self.ddim.update(eps, self.x, values, self.z))
        self.i.add_(1)
        return self.x
