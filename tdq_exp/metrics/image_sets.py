"""Features of image sets, shared by processes and cached by content, and the metrics of a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tdq_exp.data.images import CACHE_REMEDY, Images
from tdq_exp.metrics import half_sampling
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.fidelity import NEIGHBOUR, distances, precision_recall
from tdq_exp.runtime import tensor_files
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, track


class Pixels(Protocol):
    """A set of images, uint8 `[N, H, W, C]`, in memory or made when a part of it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> NDArray[np.uint8]: ...


class Known(Pixels, Protocol):
    """A set whose content has a hash."""

    @property
    def content(self) -> str:
        """Hash of the images."""
        ...


def features_of(
    network: FeatureNetwork, pixels: Pixels, batch: int, processes: Processes, label: str
) -> dict[str, torch.Tensor]:
    """Return the features of a set, layer -> float32 `[N, D]`, the same on every process.

    Each process reads a consecutive run of whole batches.
    """
    batches = -(-len(pixels) // batch)
    starts = [r * batches // processes.world * batch for r in range(processes.world)]
    bounds = [*starts, len(pixels)]
    mine = pixels[bounds[processes.rank] : bounds[processes.rank + 1]]
    with track(label, -(-len(mine) // batch), show=processes.main) as advance:
        found = network.extract(mine, batch, processes.device, lambda n: advance(f"{n} images"))

    parts = processes.gather_objects(found)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in network.layers}


def features_of_known(
    network: FeatureNetwork,
    content: str,
    pixels: Pixels,
    batch: int,
    processes: Processes,
    cache: Path,
    label: str,
) -> dict[str, torch.Tensor]:
    """Return the features of a set of known content, kept in the cache under the hashes of both.

    What computed them is part of the name: another engine's last digits differ.
    """
    engine = network.engine(processes.device)
    suffix = "" if engine == "torch" else "-" + engine.replace(" ", "_")
    name = f"{content}-{len(pixels)}-{network.weights_hash}-{batch}{suffix}.safetensors"
    file = cache / "features" / name

    # What is damaged is made again; a line says so.
    if not processes.decide(lambda: _is_whole(file, len(pixels))):
        found = features_of(network, pixels, batch, processes, label)
        about = {"of": file.stem}
        processes.decide(lambda: tensor_files.write_tensors(file, found, about, CACHE_REMEDY))
    return tensor_files.read_tensors(file).tensors


def _is_whole(file: Path, images: int) -> bool:
    """Return whether there is a file of cached features that belongs to its name."""
    if not file.exists():
        return False

    try:
        found = tensor_files.read_tensors(file)
        if not found.checked:
            raise ValueError(f"{file}: has no checksum")
        if found.metadata.get("of") != file.stem:
            raise ValueError(f"{file}: damaged (holds the features of another set)")
        if any(len(rows) != images for rows in found.tensors.values()):
            raise ValueError(f"{file}: damaged (not of {images} images)")
    except ValueError as error:
        console.print(f"{str(error).partition(';')[0]}: computed again")
        return False
    return True


@dataclass(frozen=True)
class Features:
    """How the features of image sets are computed, and where those of real images are kept.

    Args:
        network: the features.
        batch: images at a time.
        processes: who shares the work.
        cache: folder of the features of real images.
    """

    network: FeatureNetwork
    batch: int
    processes: Processes
    cache: Path

    def of(self, pixels: Pixels, label: str) -> dict[str, torch.Tensor]:
        """Return the features of images; see `features_of`."""
        return features_of(self.network, pixels, self.batch, self.processes, label)

    def of_known(self, content: str, pixels: Pixels, label: str) -> dict[str, torch.Tensor]:
        """Return the features of a known set; see `features_of_known`."""
        return features_of_known(
            self.network, content, pixels, self.batch, self.processes, self.cache, label
        )


def measure(
    features: Features,
    pixels: NDArray[np.uint8],
    train: Images,
    held_out: Images,
    metrics: list[str],
    reference_images: int | None = None,
    reconstruct: Callable[[Images, int], Known] | None = None,
) -> dict[str, Any]:
    """Measure a generated set, and as many held-out real images, against the training set.

    Args:
        features: how they are computed, and where they are kept.
        pixels: the generated set, uint8 `[N, H, W, C]`.
        train: the training set.
        held_out: real images that were not trained on.
        metrics: names, of `fidelity.METRICS`.
        reference_images: only the first so many of the training set; None takes all.
        reconstruct: (a set, how many of it) -> these images through the model's codec, if it has
            one.

    Returns:
        `few_for`: the number of features, if the generated set has no more images than that;
        `metrics` of the generated set; `held_out`: the same of real images, with their number
        `images`, which is smaller than asked if there are no more; `reconstructed`: of the
        reconstructions of these; `reference`: the training set's content and size; `features`: name
        and hash; `feature_engine`: what computed them; `half_sampling` and `precision_recall` of
        the generated set, see `beside`.
    """
    generated = features.of(pixels, "features of generated images")
    size = min(reference_images or len(train), len(train))
    reference = features.of_known(
        train.content, train.pixels[:size], "features of the training set"
    )

    # Real images say what the metrics give at best; their reconstructions, what the codec costs.
    count = min(len(pixels), len(held_out))
    real = {
        "held_out": features.of_known(
            held_out.content, held_out.pixels[:count], "features of held-out images"
        )
    }
    if reconstruct is not None:
        made = reconstruct(held_out, count)
        real["reconstructed"] = features.of_known(made.content, made, "features of reconstructions")

    network = features.network
    layers = network.metric_layers

    # With N <= D images the covariance of D features is singular, and FID's bias large.
    width = generated[layers["fid"]].shape[1] if "fid" in metrics else 0
    few = {"few_for": width} if len(pixels) <= width else {}

    def compute() -> dict[str, Any]:
        return {
            **few,
            "metrics": distances(generated, reference, layers, metrics),
            **{
                name: {"images": count, **distances(found, reference, layers, metrics)}
                for name, found in real.items()
            },
            "reference": {"content": train.content, "images": size, "protocol": train.protocol},
            "features": {"name": network.name, "weights": network.weights_hash},
            "feature_engine": network.engine(features.processes.device),
            **beside(generated, reference, layers, metrics),
        }

    return features.processes.decide(compute)


def beside(
    generated: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    layers: Mapping[str, str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Return what a row states beside the metrics that it was asked for.

    Nothing of it is part of a fingerprint: rows of before it was measured stay valid.

    Args:
        generated, reference: layer -> features `[N, D]` and `[M, D]`.
        layers: metric -> the layer that it reads.
        metrics: that were asked for.

    Returns:
        `half_sampling`: the deviation of the Frechet distance; `precision_recall`: a second metric,
        unless it is among `metrics`. A key is absent where a set is too small for it.
    """
    stated: dict[str, Any] = {}

    def pair(metric: str, least: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return both sets' features for a metric; None where there are too few, or none."""
        sets = [vectors.get(layers[metric]) for vectors in (generated, reference)]
        ours, theirs = (None if found is None else found.cpu() for found in sets)
        if ours is None or theirs is None or min(len(ours), len(theirs)) < least:
            return None
        return ours, theirs

    if "fid" in metrics and (vectors := pair("fid", half_sampling.FEWEST)):
        stated["half_sampling"] = half_sampling.deviation_of_frechet(*vectors)

    if "prc" not in metrics and (vectors := pair("prc", NEIGHBOUR + 1)):
        stated["precision_recall"] = precision_recall(*vectors)

    return stated
