"""Measure anybody's images as the rows of a model are measured, and show both side by side.

python -m tdq_exp measure samples/ --model ddim_cifar10           a folder of pictures
python -m tdq_exp measure a.npy b.npz --model digits              arrays, uint8 [N, H, W, C]
python -m tdq_exp measure statistics.npz --model ddim_cifar10     mu and sigma: the distance alone
The reference, its features and their weights are the model's; overrides as of a run, such as
data.source.path=PATH or eval.features.weights=PATH. Images are cropped and resized as the
reference was. A distance is comparable to a row of the same number of images only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tdq_exp.commands import cli
from tdq_exp.config.compose import compose
from tdq_exp.data import given
from tdq_exp.data.given import GivenImages, GivenStatistics
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.experiment.row import read_rows
from tdq_exp.metrics import half_sampling
from tdq_exp.metrics.fidelity import VALUES, Statistics, distances, frechet_distance
from tdq_exp.metrics.image_sets import Features
from tdq_exp.models import DiffusionModel
from tdq_exp.runtime import files
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, print_table, track

PIECE = 512  # images that are decoded together, rounded down to whole batches
FEWEST = pipeline.FEWEST
DEVIATION = "deviation"  # of the distance, by half-sampling


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.exit_code(show, _parser().parse_intermixed_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "python -m tdq_exp measure")

    # What is measured, and against what.
    parser.add_argument("sets", nargs="+", help="folders, .npy or .npz files; and overrides")
    parser.add_argument(
        "--model", required=True, help="whose reference and features to use: ddim_small"
    )
    parser.add_argument("--images", type=int, help="only the first so many of each set")

    # Where it goes.
    parser.add_argument("--json", type=Path, help="also write the numbers into this file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of results, whose rows are shown for comparison (default: results)",
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")

    return parser


@products("float32")  # as the features of rows were computed
def show(options: argparse.Namespace) -> None:
    """Measure the sets and print them beside the rows of the model.

    Raises:
        ValueError, OSError: for options out of range, or a set that can't be read.
    """
    # 1. What can be refused before anything is computed.
    _check(options)
    overrides = [text for text in options.sets if "=" in text and not Path(text).exists()]
    job = jobs.build(
        compose([f"model={options.model}", "method=fp", "model.weights=none", *overrides])
    )
    paths = [Path(text).expanduser() for text in options.sets if text not in overrides]
    sets = _sets(paths, job.model, options.images)

    # 2. The reference.
    processes = Processes(cpu=options.cpu)
    data = pipeline.load_data(job, processes)
    features = Features(job.features(), job.evaluation.batch, processes, job.data.cache)
    count = min(job.evaluation.reference_images or len(data.train), len(data.train))
    reference = features.of_known(
        data.train.content, data.train.pixels[:count], "features of the training set"
    )

    # 3. The sets.
    metrics, images = job.evaluation.metrics, options.images
    measured = {str(one.path): _measure(one, features, reference, metrics, images) for one in sets}

    # 4. In a table beside the rows, with what has to be known of each, and in a file.
    network, train = features.network, data.train
    about = {
        "features": {"name": network.name, "weights": network.weights_hash},
        "reference": {"content": train.content, "images": count, "protocol": train.protocol},
    }
    label = job.config["model"]["label"]
    _print(measured, about, _rows_beside(options.out.expanduser(), label, about))

    for one in sets:
        notes = [
            *_preparations(one, job.model.image_size),
            *_cautions(one, features, reference, metrics, images),
        ]
        for line in notes:
            console.print(f"note: {line}")

    if options.json is not None:
        files.write_json(options.json, {"sets": measured, **about})
        console.print(f"numbers  {options.json}")


def _check(options: argparse.Namespace) -> None:
    """Refuse options out of range, and write the home folder of `--json` out."""
    if options.images is not None and options.images < 1:
        raise ValueError(f"--images={options.images}: must be at least 1")

    if options.json is not None:
        options.json = options.json.expanduser()
        files.require_folder(options.json.parent, "--json")
        if options.json.is_dir():
            raise ValueError(f"--json={options.json}: is a folder; name a file")


def _sets(
    paths: Sequence[Path], model: DiffusionModel, images: int | None
) -> list[GivenImages | GivenStatistics]:
    """Return the sets, opened.

    Args:
        paths: of them.
        model: whose images they are compared with.
        images: only the first so many of each.

    Raises:
        ValueError, OSError: for no set, one of too few images, or one that can't be read.
    """
    if not paths:
        raise ValueError("measure: name a folder of pictures, a .npy or a .npz file")

    sets = [given.read(path, model.image_size, model.channels) for path in paths]
    for one in sets:
        if isinstance(one, GivenStatistics) and images is not None:
            raise ValueError(
                f"--images={images}: {one.path} holds mean and covariance, and no images"
            )
        if isinstance(one, GivenImages) and _count(one, images) < FEWEST:
            raise ValueError(f"{one.path}: a distance needs at least {FEWEST} images")
    return sets


def _preparations(one: GivenImages | GivenStatistics, size: int) -> list[str]:
    """Return lines on what was done to the images of a set before they were measured."""
    if isinstance(one, GivenStatistics):
        return []

    notes = list(one.notes)
    if one.sizes - {(size, size)}:
        notes.append(
            f"{one.path} holds images of {_sizes(one)}; they were cropped and resized to"
            f" {size}x{size}, as the reference was"
        )
    return notes


def _sizes(one: GivenImages) -> str:
    """Return the sizes of the images of a set, in words."""
    by_area = sorted(one.sizes, key=lambda size: (size[0] * size[1], size))
    sizes = [f"{height}x{width}" for height, width in by_area]
    return sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"


def _count(one: GivenImages, images: int | None) -> int:
    """Return how many images of a set are measured."""
    return min(one.count, images or one.count)


def _measure(
    one: GivenImages | GivenStatistics,
    features: Features,
    reference: dict[str, torch.Tensor],
    metrics: list[str],
    images: int | None,
) -> dict[str, Any]:
    """Return the numbers of one set.

    Args:
        one: the set.
        features: how they are computed.
        reference: layer -> features of the reference.
        metrics: names, of `fidelity.METRICS`.
        images: only the first so many.

    Raises:
        ValueError: naming the set, if a metric is undefined on it.
    """
    layers = features.network.metric_layers

    try:
        if isinstance(one, GivenStatistics):
            theirs = Statistics.of(reference[layers["fid"]])
            return {"fid": frechet_distance(Statistics(one.mu, one.sigma, 0), theirs)}

        count = min(images or one.count, one.count)
        found = _features(one, count, features)
        numbers = {"images": count, **distances(found, reference, layers, metrics)}
        if count >= half_sampling.FEWEST:
            vectors = found[layers["fid"]], reference[layers["fid"]]
            numbers[DEVIATION] = half_sampling.deviation_of_frechet(*vectors)["fid"]
        return numbers
    except ValueError as error:
        if str(error).startswith(str(one.path)):  # a picture of a folder is named already
            raise
        raise ValueError(f"{one.path}: {error}") from error


def _cautions(
    one: GivenImages | GivenStatistics,
    features: Features,
    reference: dict[str, torch.Tensor],
    metrics: list[str],
    images: int | None,
) -> list[str]:
    """Return lines on how far a set's distance can be compared; arguments as `_measure`."""
    name, layer = features.network.name, features.network.metric_layers["fid"]
    if isinstance(one, GivenStatistics):
        return [
            f"{one.path} does not say of which features mu and sigma are; their distance means"
            f" something only if they are {name}'s ({layer}), of images prepared as the reference"
        ]

    count, width = _count(one, images), reference[layer].shape[1]
    if "fid" not in metrics or count > width:
        return []
    return [
        f"{one.path}: the Frechet distance of {count} images by {width} features is mostly bias:"
        " compare it with sets of as many images only"
    ]


def _features(one: GivenImages, count: int, features: Features) -> dict[str, torch.Tensor]:
    """Return the features of a set's first images, decoded a piece at a time."""
    batch, network = features.batch, features.network
    piece = max(1, PIECE // batch) * batch
    found = []

    with track(f"features of {one.path.name}", -(-count // piece)) as advance:
        for start in range(0, count, piece):
            stop = min(start + piece, count)
            pixels = one.piece(start, stop)
            found.append(
                network.extract(pixels, batch, features.processes.device, lambda images: None)
            )
            advance(f"{stop} of {count} images")

    return {layer: torch.cat([part[layer] for part in found]) for layer in network.layers}


def _rows_beside(out: Path, model: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a model that were measured against the same reference, best first."""
    rows = [
        row
        for file in sorted((out / "runs").glob("*/seed*/*/metrics.json"))
        for row in read_rows(file)
        if row["config"]["model"]["label"] == model
        and row["features"]["weights"] == about["features"]["weights"]
        and row["reference"] == about["reference"]
    ]
    return sorted(rows, key=_distance)


def _distance(row: dict[str, Any]) -> float:
    return float(row["metrics"].get("fid", float("inf")))


def _print(
    measured: dict[str, dict[str, Any]], about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Print the sets, then the rows, in one table."""
    every = [*measured.values(), *(row["metrics"] for row in rows)]
    keys = [key for key in VALUES if any(key in numbers for numbers in every)]

    lines = [
        [path, numbers.get("images"), *(numbers.get(key) for key in keys), numbers.get(DEVIATION)]
        for path, numbers in measured.items()
    ]
    lines += [
        [
            f"{row['name']} {row['sample']}",
            row["images"],
            *(row["metrics"].get(key) for key in keys),
            row.get("half_sampling", {}).get("fid"),
        ]
        for row in rows
    ]

    features, reference = about["features"], about["reference"]
    title = (
        f"{features['name']} features ({features['weights']}), {reference['images']} reference"
        f" images ({reference['content']})"
    )
    headers = ["", "images", *(VALUES[key].label for key in keys), "its deviation"]
    print_table(title, headers, lines)
