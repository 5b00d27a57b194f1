"""Calibration sets: which x_t, at which t, post-training quantization is shown.

| kind             | x_t                               | t                                     |
|------------------|-----------------------------------|---------------------------------------|
| `uniform`        | on the float model's trajectories | different steps of each, at random    |
| `ndtc`           | the same                          | `mu T + sigma T n`, clipped, n normal |
| `ndtc_published` | the same, at T - 1 - t            | as `ndtc`                             |
| `forward`        | noised training images            | evenly over 0..T-1                    |

`ndtc` is skewed to small t; the published code pairs its x and t in reverse. `forward` needs no
trajectories.

Each trajectory has noise of its own key, and trajectories are computed in fixed groups, so that a
set is the same bits for any number of processes and after any interruption. A set is made once
under its fingerprint and shared by every run that asks for the same one (see `stored_set`).

Source: Shang et al., *Post-training Quantization on Diffusion Models* (PTQ4DM), arXiv 2211.15736;
`uniform`: So et al., arXiv 2306.02316. The published code of PTQ4DM stores a sample when the index
of its loop equals t, and the loop begins with the noisiest step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tdq_exp.data.arrays import in_groups
from tdq_exp.data.completed import complete
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.draws import Stream, fixed_draws, generator, starting_noise
from tdq_exp.diffusion.objective import Samples
from tdq_exp.fit.calibration_options import CalibrationSpec
from tdq_exp.fit.ptq.stored_set import CalibrationSet, require_parts
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes

GROUP = 64  # trajectories that are computed at a time


def chosen_steps(
    spec: CalibrationSpec, visited: list[int], total: int, image: int
) -> list[tuple[int, int]]:
    """Return which steps of one trajectory are stored.

    Args:
        spec: of the set.
        visited: time steps of the sampler, noisiest first.
        total: T.
        image: number of the trajectory.

    Returns:
        For every sample, the position in `visited` whose x is stored, and the t stored with it.

    Raises:
        ValueError: if `uniform` asks for more samples of a trajectory than it has steps.
    """
    count, g = spec.samples // spec.images, generator(spec.seed, Stream.CALIBRATION_TIMES, image)

    # Any steps of the trajectory, none twice.
    if spec.kind == "uniform":
        require_steps(spec, len(visited))
        places = torch.randperm(len(visited), generator=g)[:count].tolist()
        return [(place, visited[place]) for place in places]

    # Normal t, clipped, and the nearest visited step of each.
    normal = torch.randn(count, generator=g)
    drawn = (spec.mu * total + spec.sigma * total * normal).clamp(0, total - 1)
    steps = torch.tensor(visited, dtype=torch.float32)
    nearest = (drawn[:, None] - steps).abs().argmin(1).tolist()

    if spec.kind == "ndtc":
        return [(place, visited[place]) for place in nearest]

    # The published code stores x of the step that is nearest to T - 1 - t.
    reverse = ((total - 1 - steps[nearest])[:, None] - steps).abs().argmin(1).tolist()
    return [(taken, visited[place]) for taken, place in zip(reverse, nearest, strict=True)]


def require_steps(spec: CalibrationSpec, visited: int) -> None:
    """Refuse a `uniform` set of more samples of each trajectory than it has steps.

    Args:
        spec: of the set.
        visited: number of steps of the sampler.

    Raises:
        ValueError: naming the key.
    """
    count = spec.samples // spec.images
    if spec.kind == "uniform" and count > visited:
        raise ValueError(
            f"calibration.samples={spec.samples}: {count} of each trajectory, but the sampler"
            f" has {visited} steps; take more calibration.images"
        )


@torch.no_grad()
def make_set(
    spec: CalibrationSpec,
    denoiser: Denoiser,
    sampler: Ddim,
    images: Samples | None,
    *,
    parts: Mapping[str, Any],
    cache: Path,
    processes: Processes,
    path: Path | None = None,
) -> CalibrationSet:
    """Return a set: found, made, or continued after an interruption.

    Args:
        spec: what it holds.
        denoiser: the float network, on the processes' device, in eval mode.
        sampler: of the trajectories.
        images: the training set, for `forward`; the others need none.
        parts: see `CalibrationSpec.parts`.
        cache: where sets are kept, each under its fingerprint.
        processes: who shares the work.
        path: of a finished set that is to be used; it is refused if it is of other parts.
    """
    folder = path or cache / "calibration_sets" / files.fingerprint(parts)
    found = CalibrationSet(
        folder,
        spec.samples,
        spec.images,
        denoiser.model.sample_shape,
        GROUP,
        _example_condition(spec, denoiser, images),
        of=files.fingerprint(parts),
    )

    # A given set is checked; one of ours is begun if need be.
    if path is not None:
        processes.decide(lambda: require_parts(folder, parts))
    else:
        processes.decide(lambda: found.create(parts))

    rows_of = _noised if spec.kind == "forward" else _trajectories

    def make(indices: range) -> dict[str, NDArray[Any]]:
        rows = rows_of(spec, denoiser, sampler, images, indices, processes.device)
        return {name: values.numpy() for name, values in rows.items() if values is not None}

    title, making = "calibration set", None if path is not None else "a calibration set"
    batches = in_groups(spec.images, GROUP)
    complete(found.arrays, batches, make, processes, title=title, making=making)
    return found


def _example_condition(
    spec: CalibrationSpec, denoiser: Denoiser, images: Samples | None
) -> Tensor | None:
    """Return the condition of one trajectory or training image, which shows its type and shape."""
    if spec.kind == "forward":
        assert images is not None
        return images.condition(torch.zeros(1, dtype=torch.long))
    return denoiser.model.draw_condition(spec.seed, Stream.TRAJECTORY, range(1))


def _noised(
    spec: CalibrationSpec,
    denoiser: Denoiser,
    sampler: Ddim,
    images: Samples | None,
    indices: range,
    device: torch.device,
) -> dict[str, Tensor | None]:
    """Return the rows of training images, each noised to several t."""
    assert images is not None
    model = denoiser.model

    each = spec.samples // spec.images
    draws = fixed_draws(
        spec.seed,
        Stream.FORWARD_TIMES,
        samples=spec.samples,
        images=spec.samples,
        shape=(1,),
        steps=model.schedule.steps,
    )

    # Time steps, and images in the order of the set.
    t = draws.t[indices.start * each : indices.stop * each]
    order = torch.randperm(len(images), generator=generator(spec.seed, Stream.FORWARD_IMAGES))
    pick = order[torch.tensor(list(indices)) % len(images)]

    # Latents are drawn from the codec, each with noise of its own key.
    noise = None
    if images.random:
        streams = [generator(spec.seed, Stream.FORWARD_LATENTS, i) for i in indices]
        noise = torch.stack([torch.randn(model.sample_shape, generator=g) for g in streams])
    x_0 = images.batch(pick, torch.zeros(len(pick), dtype=torch.bool), noise)

    streams = [generator(spec.seed, Stream.FORWARD_NOISE, i) for i in indices]
    eps = torch.cat([torch.randn(each, *model.sample_shape, generator=g) for g in streams])

    image = torch.tensor(list(indices)).repeat_interleave(each)
    x_t = model.schedule.add_noise(x_0.repeat_interleave(each, 0), eps, t)
    return {"x": x_t, "t": t, "image": image, "x_0": x_0, "condition": images.condition(pick)}


def _trajectories(
    spec: CalibrationSpec,
    denoiser: Denoiser,
    sampler: Ddim,
    images: Samples | None,
    indices: range,
    device: torch.device,
) -> dict[str, Tensor | None]:
    """Return the rows of denoising trajectories, of which the chosen steps are kept.

    The last group is padded, so that every trajectory is computed in a whole group.
    """
    model = denoiser.model
    padded = range(indices.start, indices.start + GROUP)
    visited = [t for t, _ in sampler.pairs(model.schedule)]
    chosen = [chosen_steps(spec, visited, model.schedule.steps, i) for i in indices]
    each = spec.samples // spec.images

    # Where each stored x_t comes from: place in the trajectory -> (row, number).
    x = torch.empty(len(indices), each, *model.sample_shape)
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row, samples in enumerate(chosen):
        for number, (place, _) in enumerate(samples):
            wanted.setdefault(place, []).append((row, number))

    place = 0

    def keep(t: int, x_t: Tensor) -> None:
        nonlocal place
        for row, number in wanted.get(place, []):
            x[row, number] = x_t[row].cpu()
        place += 1

    generators = [generator(spec.seed, Stream.TRAJECTORY, i) for i in padded]
    x_t = starting_noise(generators, model.sample_shape).to(device)

    condition = model.draw_condition(spec.seed, Stream.TRAJECTORY, padded)
    denoiser = denoiser.conditioned(condition, device)
    x_0 = sampler.sample(denoiser, x_t, model.schedule, generators, keep)

    # The padding is dropped.
    t = torch.tensor([[t for _, t in samples] for samples in chosen])
    return {
        "x": x.flatten(0, 1),
        "t": t.flatten(),
        "image": torch.tensor(list(indices)).repeat_interleave(each),
        "x_0": x_0[: len(indices)].cpu(),
        "condition": None if condition is None else condition[: len(indices)],
    }
