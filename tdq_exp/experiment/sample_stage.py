"""The sample stage: images in groups, dealt out to processes, resumable at every group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.data.images import Images, to_uint8
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.denoising_graph import DenoisingGraph
from tdq_exp.diffusion.draws import Stream, generator, groups, image_generators, starting_noise
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.engines import SIMULATED, ImageSet, engine
from tdq_exp.experiment.fit_stage import FittedModel
from tdq_exp.experiment.places import UNKNOWN, place_of
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track
from tdq_exp.runtime.stage import Result, StageFile, stage


@dataclass(frozen=True)
class SampleStage:
    """Which set is sampled, and where it is kept.

    Args:
        folder: of the set.
        record: of the stage.
        net: gives the network, made when it is first wanted.
        update: of the checkpoint that is sampled; None for the last network.
    """

    folder: Path
    record: StageFile
    net: Callable[[], nn.Module]
    update: int | None = None

    def require_same(self) -> None:
        """Refuse the folder if it holds a set of another configuration.

        Raises:
            ValueError: with the difference.
        """
        self.record.begun()


@dataclass(frozen=True)
class SampledSet:
    """A finished set of images.

    Args:
        pixels: uint8 `[N, H, W, C]`.
        seconds: that it took, interrupted runs included.
        engine: of its quantized layers.
        made: where it was sampled (see `place_of`), in turn; `UNKNOWN` stands for what was sampled
            before this was noted.
    """

    pixels: NDArray[np.uint8]
    seconds: float
    engine: str
    made: list[dict[str, Any]] = field(default_factory=list)


def sample_stage_of(
    job: Experiment,
    fit: FittedModel,
    folder: Path,
    net: Callable[[], nn.Module],
    update: int | None = None,
) -> SampleStage:
    """Return the stage of a set.

    Args:
        job: the experiment.
        fit: that the network is of.
        folder: of the set.
        net: gives the network.
        update: of the checkpoint that is sampled; None for the last network.
    """
    parts = {
        "fit": fit.fingerprint,
        "report": job.fit.options.report,
        "update": update,
        **job.part("sampler"),
    }
    return SampleStage(
        folder, StageFile(folder / "samples.json", parts, keep="sampler.label"), net, update
    )


def store_of(job: Experiment, folder: Path, of: str) -> ImageStore:
    """Return the images of a set, finished or not.

    Args:
        job: the experiment.
        folder: of the set.
        of: its fingerprint.
    """
    size, s = job.model.image_size, job.sampling
    shape = (size, size, job.model.channels)
    return ImageStore(folder / "images", s.images, s.batch, shape, of)


def run_sampling(job: Experiment, sampling: SampleStage, processes: Processes) -> SampledSet:
    """Sample what is missing of a set.

    Raises:
        ValueError: if there are images, but no record of what they are.
    """
    folder, record = sampling.folder, sampling.record
    store = store_of(job, folder, record.fingerprint)
    engines: list[str] = []
    made: list[dict[str, Any]] = []

    def facts(seconds: float, name: str | None) -> Result:
        """Return what the record says; of the engine, where another one was to be had."""
        named = {} if name in (None, SIMULATED) else {"engine": name}
        return {"seconds": seconds, "made": made, **named}

    def begin() -> tuple[float, str | None]:
        found = record.begun()
        if found is None and (folder / "images").exists():
            raise ValueError(
                f"{folder / 'images'}: there are images, but no samples.json that belongs to them;"
                " remove them to sample again"
            )
        # Of images that were removed nothing is left: neither their time, nor where they were made.
        left = found if found is not None and (folder / "images").exists() else {}
        earlier = float(left.get("seconds", 0.0))
        made.extend(left.get("made", []))
        if not made and earlier:  # groups of a version that did not note it
            made.append(UNKNOWN)
        begun_with = found.get("engine") if found else None
        record.write(facts(earlier, begun_with))
        return earlier, begun_with

    def make() -> Result:
        earlier, begun_with = processes.decide(begin)
        net, name = engine(
            sampling.net(),
            job.model,
            job.sampling.engine,
            ImageSet(folder, store, begun_with),
            processes,
            job.sampling.min_speedup,
        )
        engines.append(name)
        if name not in (SIMULATED, begun_with):  # before there is an image
            processes.decide(lambda: record.write(facts(earlier, name)))

        here = place_of(processes)

        def note(seconds: float) -> None:  # after each group, so that an interrupted run counts too
            if not made or made[-1] != here:
                made.append(here)
            record.write(facts(earlier + seconds, name))

        spent = sample_set(
            Denoiser(net, job.model),
            job.sampler,
            store,
            seed=job.sampling.seed,
            processes=processes,
            truncate=job.sampling.truncate,
            on_group=note,
        )
        return facts(earlier + spent, name)

    # The record never says `done`: its store knows which groups are there.
    result, _ = stage(record, make, processes)

    return SampledSet(store.read(), result["seconds"], engines[0], made)


@torch.no_grad()
def sample_group(
    denoiser: Denoiser,
    sampler: Ddim | DenoisingGraph,
    indices: range,
    *,
    seed: int,
    device: torch.device,
    stream: Stream = Stream.IMAGE,
    truncate: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Return one group of images, uint8 `[batch, H, W, C]`.

    Args:
        denoiser: its network in eval mode, on the device.
        sampler: DDIM, or another with the same call.
        indices: global image indices; each has noise, and a condition if any, of its own.
        seed: of the set.
        device: where to compute.
        stream: of the noise.
        truncate: drop the fraction of a pixel in place of rounding (see `to_uint8`).
        on_step: called with (t, x_t) before every step.
    """
    model = denoiser.model
    generators = image_generators(seed, indices, stream)

    x = starting_noise(generators, model.sample_shape).to(device)
    denoiser = denoiser.conditioned(model.draw_condition(seed, stream, indices), device)
    x = sampler.sample(denoiser, x, model.schedule, generators, on_step)
    return to_uint8(model.decode(x).cpu(), truncate).numpy()


def sample_set(
    denoiser: Denoiser,
    sampler: Ddim,
    store: ImageStore,
    *,
    seed: int,
    processes: Processes,
    truncate: bool = False,
    on_group: Callable[[float], None] | None = None,
) -> float:
    """Fill a store with the groups that are missing; return the seconds that it took.

    The missing groups are dealt out in turn: the set is the same bits for any number of processes.

    Args:
        denoiser: its network baked, or float.
        sampler: DDIM, or another with the same call.
        store: of the set.
        seed: of the set.
        processes: who shares the work.
        truncate: see `sample_group`.
        on_group: called on the main process with the seconds so far, after each of its groups.
    """
    # 1. What is left to do, and this process' part of it.
    processes.decide(store.create)
    missing = processes.decide(store.missing)
    mine = missing[processes.rank :: processes.world]
    every = dict(groups(store.images, store.batch))
    done = len(every) - len(missing)

    # 2. Group by group; each is on disk before the next is begun.
    denoiser.net.to(processes.device).eval()
    group_sampler = DenoisingGraph(sampler) if isinstance(sampler, Ddim) else sampler

    began = time.monotonic()
    with (
        processes.sharing(),
        track("sampling", len(every), done, show=processes.main) as advance,
    ):
        for group in mine:
            pixels = sample_group(
                denoiser,
                group_sampler,
                every[group],
                seed=seed,
                device=processes.device,
                truncate=truncate,
            )

            store.put(group, pixels)
            if on_group is not None and processes.main:
                on_group(time.monotonic() - began)

            for _ in range(processes.world):  # the others go at the same pace
                if done < len(every):
                    done += 1
                    advance(f"{min((group + 1) * store.batch, store.images)} images")

    return time.monotonic() - began


class Reconstructions:
    """Real images as the model itself gives them back, made as they are read: uint8 `[N, H, W, C]`.

    Args:
        model: with a lossy x_0.
        images: in pixels.
        count: N, the first of them.
        processes: each makes what it reads.
    """

    BATCH = 100

    def __init__(
        self, model: DiffusionModel, images: Images, count: int, processes: Processes
    ) -> None:
        self.model, self.images, self.count, self.processes = model, images, count, processes
        if model.codec is None:
            raise ValueError("this model has no codec: its images are reconstructed exactly")
        self.codec = model.codec
        self.content = f"{images.content}-{model.codec.fingerprint}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        index = torch.arange(*part.indices(self.count))

        made, device = [], self.processes.device
        with (
            track(
                "reconstructing", -(-len(index) // self.BATCH), show=self.processes.main
            ) as advance,
            torch.no_grad(),
        ):
            # An empty tensor would split into one empty part.
            for some in index.split(self.BATCH) if len(index) else ():
                images = self.images.batch(some, torch.zeros(len(some), dtype=torch.bool))
                streams = [generator(0, Stream.RECONSTRUCTION, int(i)) for i in some]
                noise = [torch.randn(self.model.sample_shape, generator=g) for g in streams]

                back = self.codec.reconstruct(images.to(device), torch.stack(noise).to(device))
                made.append(to_uint8(back.cpu()).numpy())
                advance(f"{int(some[-1]) + 1} images")

        # Nothing to make: with few images, some processes have no part in a set.
        empty = np.zeros(
            (0, self.model.image_size, self.model.image_size, self.model.channels), np.uint8
        )
        return np.concatenate([empty, *made])


def write_pngs(pixels: NDArray[np.uint8], folder: Path) -> None:
    """Write every image as a PNG, `00000.png` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{index:05d}.png"
        )
