"""Compare sets of images that were made from the same noise: equal pixels, and the distance of the sets.

    python scripts/analysis/compare_sets.py results/runs/NAME/seed0/ddim50_n5000 results/runs/NAME/seed0/ddim50_n5000_integer ...

The first set is compared with each of the others, all on as many images as the smallest one holds.
Use it to judge another engine by a control, the same engine at another batch size: whole
trajectories part after many steps for any two orders of summation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdq_exp.commands import cli
from tdq_exp.config.compose import compose
from tdq_exp.config.schema import plain
from tdq_exp.data.arrays import finished_images
from tdq_exp.experiment import build as jobs
from tdq_exp.metrics.fidelity import Statistics, frechet_distance
from tdq_exp.metrics.image_sets import features_of
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import print_table


def read(folder: Path) -> NDArray[np.uint8]:
    """Return the images of a sampled set, uint8 `[N, H, W, C]`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or not finished.
    """
    file = folder / "images" / "images.npy"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder}: holds no images/images.npy; name the sampler's folder of a run"
        )
    return finished_images(file)


def main() -> int:
    """Print one line for each pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", type=Path, nargs="+", help="folders of sampled sets")
    parser.add_argument(
        "--features", default="efficientnet_lite0", help="inception, efficientnet_lite0 or digits"
    )
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: 8)")
    return cli.exit_code(compare, parser.parse_args())


def compare(options: argparse.Namespace) -> None:
    """Compare the first set with each of the others.

    Raises:
        ValueError, OSError: if there is nothing to compare, or the images are of different shapes.
    """
    if len(options.sets) < 2:
        raise ValueError("name at least two sets")

    sets = [read(folder) for folder in options.sets]
    shapes = {images.shape[1:] for images in sets}
    if len(shapes) > 1:
        raise ValueError(
            f"the sets' images are of different shapes: {', '.join(map(str, sorted(shapes)))}"
        )

    count = min(len(images) for images in sets)
    sets = [images[:count] for images in sets]

    network, processes = (
        jobs.features_of(plain(compose([f"eval={options.features}"]))),
        Processes(cpu=True),
    )
    layer = network.metric_layers["fid"]
    statistics = [
        Statistics.of(features_of(network, images, options.batch, processes, "features")[layer])
        for images in sets
    ]

    rows = []
    for folder, images, of in zip(options.sets[1:], sets[1:], statistics[1:], strict=True):
        apart = np.abs(sets[0].astype(np.int16) - images)
        distance = frechet_distance(statistics[0], of)
        rows.append((folder.name, float((apart == 0).mean()), float(apart.mean()), float(distance)))

    print_table(
        f"{options.sets[0]} against, {count} images",
        [
            "set",
            "equal pixels",
            "mean difference, of 255",
            f"Frechet distance ({network.name} features)",
        ],
        rows,
    )
    processes.close()


if __name__ == "__main__":
    sys.exit(main())
