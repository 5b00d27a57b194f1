"""x_t of a float network's own sampling: what networks are shown when they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment.build import Experiment
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime.progress import track

# Called with a module, its input and its output.
Note = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Trajectory:
    """The states that a float network passes through, least noisy first.

    Args:
        t: time steps, `[S]`, ascending.
        x: x_t at each of them, `[S, B, C, H, W]`.
    """

    t: list[int]
    x: list[Tensor]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return zip(self.t, self.x, strict=True)


def float_trajectory(
    job: Experiment, net: nn.Module, images: int, steps: int, seed: int = 0
) -> Trajectory:
    """Sample a float network with DDIM, without added noise, and keep every x_t.

    Args:
        job: whose model and sampler are taken.
        net: its float network.
        images: B.
        steps: S.
        seed: of the starting noise; 0 starts as the images of a row do.
    """
    sampler = dataclasses.replace(job.sampler, steps=steps, eta=0.0)
    states: list[tuple[int, Tensor]] = []

    with track(f"sampling {job.config['model']['label']}", steps) as advance:

        def on_step(t: int, x: Tensor) -> None:
            states.append((t, x.clone()))
            advance(f"t = {t}")

        noise = starting_noise(image_generators(seed, range(images)), job.model.sample_shape)
        with torch.no_grad():
            sampler.sample(Denoiser(net, job.model), noise, job.model.schedule, on_step=on_step)

    states.reverse()
    return Trajectory([t for t, _ in states], [x for _, x in states])


@contextmanager
def watching(layers: Mapping[str, nn.Module], note: Callable[[str], Note]) -> Iterator[None]:
    """Call a function whenever one of some modules has run.

    Args:
        layers: by name.
        note: name -> what is called with the module, its first input and its output.
    """

    def hook(name: str) -> Any:
        seen = note(name)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen(module, inputs[0], output)

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(values: Any, digits: int = 4) -> Any:
    """Return numbers, in lists and dicts, with so many significant digits: records stay small."""
    if isinstance(values, Mapping):
        return {key: rounded(value, digits) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    if isinstance(values, Tensor):
        return rounded(values.tolist(), digits)
    return float(f"{values:.{digits}g}") if isinstance(values, float) else values
