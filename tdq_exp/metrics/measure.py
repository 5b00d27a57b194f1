"""Features of image sets, shared by processes and cached by content; and the metrics of one set against another."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from tdq_exp.data.images import Images
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.fidelity import distances
from tdq_exp.processes import Processes
from tdq_exp.progress import track


def features_of(
    network: FeatureNetwork, pixels: NDArray[np.uint8], batch: int, processes: Processes, label: str
) -> dict[str, torch.Tensor]:
    """Layer -> float32 `[N, D]`, the same on every process. Each process reads a consecutive run of whole batches."""
    batches = -(-len(pixels) // batch)
    bounds = [r * batches // processes.world * batch for r in range(processes.world)] + [len(pixels)]
    mine = pixels[bounds[processes.rank] : bounds[processes.rank + 1]]
    with track(label, -(-len(mine) // batch), show=processes.main) as advance:
        found = network.extract(mine, batch, processes.device, lambda n: advance(f"{n} images"))
    parts = processes.gather_objects(found)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in network.layers}


def features_of_real(
    network: FeatureNetwork, images: Images, count: int, batch: int, processes: Processes, cache: Path, label: str
) -> dict[str, torch.Tensor]:
    """Features of the first `count` images of a real set, kept in the cache under the content of both."""
    file = cache / "features" / f"{images.content}-{count}-{network.weights_hash}-{batch}.safetensors"
    if not processes.decide(file.exists):
        found = features_of(network, images.pixels[:count], batch, processes, label)
        processes.decide(lambda: _save(found, file))
    return load_file(file)


def _save(features: dict[str, torch.Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two runs may fill the shared cache at the same time.
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.stem, suffix=".part", delete=False) as part:
        part.write(save(features))
    os.replace(part.name, file)


def measure(
    network: FeatureNetwork,
    pixels: NDArray[np.uint8],
    train: Images,
    held_out: Images,
    metrics: list[str],
    batch: int,
    processes: Processes,
    cache: Path,
    reference_images: int | None = None,
) -> dict[str, Any]:
    """A generated set, and as many held-out real images, against the training set, or its first `reference_images`.

    Returns:
        `metrics` of the generated set; `held_out`: the same of real images, with their number `images`, which is smaller
        than asked if there are no more; `reference`: the training set's content and size; `features`: name and hash.
    """
    generated = features_of(network, pixels, batch, processes, "features of generated images")
    size = min(reference_images or len(train), len(train))
    reference = features_of_real(network, train, size, batch, processes, cache, "features of the training set")
    count = min(len(pixels), len(held_out))
    real = features_of_real(network, held_out, count, batch, processes, cache, "features of held-out images")
    layers = network.metric_layers

    def compute() -> dict[str, Any]:
        return {
            "metrics": distances(generated, reference, layers, metrics),
            "held_out": {"images": count, **distances(real, reference, layers, metrics)},
            "reference": {"content": train.content, "images": size, "protocol": train.protocol},
            "features": {"name": network.name, "weights": network.weights_hash},
        }

    return processes.decide(compute)
