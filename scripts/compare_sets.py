"""How far apart sets of images are that were made from the same noise: share of equal pixels, and the distance of the sets.

    python scripts/compare_sets.py results/runs/NAME/seed0/ddim50_n5000 results/runs/NAME/seed0/ddim50_n5000_integer ...

The first set is compared with each of the others, all on as many images as the smallest one holds. Use it to judge another engine by a control, the same engine at another
batch size: whole trajectories part after many steps for any two orders of summation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.metrics.fidelity import Statistics, frechet_distance
from tdq_exp.metrics.measure import features_of
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import print_table


def read(folder: Path) -> NDArray[np.uint8]:
    """uint8 `[N, H, W, C]` of a sampled set.

    Raises:
        FileNotFoundError: if there is none.
    """
    file = folder / "images" / "images.npy"
    if not file.exists():
        raise FileNotFoundError(f"{folder}: holds no images/images.npy; name the sampler's folder of a run")
    return np.load(file, mmap_mode="r")


def main() -> None:
    """Prints one line for each pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", type=Path, nargs="+", help="folders of sampled sets")
    parser.add_argument("--features", default="efficientnet_lite0", help="inception, efficientnet_lite0 or digits")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    if len(options.sets) < 2:
        sys.exit("error: name at least two sets")
    try:
        sets = [read(folder) for folder in options.sets]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    shapes = {s.shape[1:] for s in sets}
    if len(shapes) > 1:
        sys.exit(f"error: the sets' images are of different shapes: {', '.join(map(str, sorted(shapes)))}")
    count = min(len(s) for s in sets)
    sets = [s[:count] for s in sets]
    try:
        network, processes = jobs.features_of(compose([f"eval={options.features}"])), Processes(cpu=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    layer = network.metric_layers["fid"]
    stats = [Statistics.of(features_of(network, s, options.batch, processes, "features")[layer]) for s in sets]
    rows = []
    for folder, other, of in zip(options.sets[1:], sets[1:], stats[1:], strict=True):
        apart = np.abs(sets[0].astype(np.int16) - other)
        rows.append(
            (folder.name, float((apart == 0).mean()), float(apart.mean()), float(frechet_distance(stats[0], of)))
        )
    print_table(
        f"{options.sets[0]} against, {count} images",
        ["set", "equal pixels", "mean difference, of 255", f"Frechet distance ({network.name} features)"],
        rows,
    )
    processes.close()


if __name__ == "__main__":
    main()
