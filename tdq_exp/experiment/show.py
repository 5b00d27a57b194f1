"""What a person sees of a run: a grid of images, its row beside the float model's, paths."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from tdq_exp.config.schema import parts_of
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.measure_stage import rows_file
from tdq_exp.experiment.row import read_rows, real_metrics
from tdq_exp.experiment.sample_stage import sample_group, store_of, write_pngs
from tdq_exp.metrics import VALUES
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime import figures
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console, print_table
from tdq_exp.runtime.tracking import Tracker

REAL_NAMES = {"held_out": "real, held out", "reconstructed": "real, reconstructed"}


def publish(
    job: Experiment,
    folder: Path,
    row: dict[str, Any],
    tracker: Tracker | None,
    processes: Processes,
) -> None:
    """Draw the images of a row, and write their PNGs, if they are not there yet; tell a tracker.

    Args:
        job: the experiment.
        folder: of the images.
        row: theirs.
        tracker: to be told; None if the row was there already.
        processes: the main one draws.
    """
    processes.decide(lambda: _draw(job, folder, row, processes))
    processes.decide(lambda: _write_pngs(job, folder, row))
    if tracker is None:
        return

    numbers = {**row["metrics"], **real_metrics(row)}
    tracker.summary({**numbers, "features": row["features"], "images": row["images"]})
    tracker.picture("samples", folder / "grid.png")


def _write_pngs(job: Experiment, folder: Path, row: dict[str, Any]) -> None:
    """Write the images of a row as PNGs, if they are asked for and not there."""
    pngs = folder / "png"
    if not job.sampling.png or not (folder / "images").exists():
        return
    if len(list(pngs.glob("*.png"))) < row["images"]:
        write_pngs(store_of(job, folder, row["fingerprints"]["sample"]).read(), pngs)


def _draw(job: Experiment, folder: Path, row: dict[str, Any], processes: Processes) -> None:
    """Draw a grid of samples; for a quantized net below the float net's from the same noise.

    Its title has the row's number, so it is signed with the set and the measurement. It stays as
    long as that row stands beside it, and is drawn again once only rows of other ways do.
    """
    path, of = folder / "grid.png", row["fingerprints"]["sample"]
    measured = {r["fingerprints"]["measure"] for r in read_rows(folder / "metrics.json")}
    titled = {f"{of}_{measure}" for measure in measured}

    whole = path.exists() and figures.is_whole(path)
    if whole and figures.signature(path) in {of, None, *titled}:  # `of`: an earlier version's
        return

    # A row may stand without its images; then there is nothing to draw.
    if not (folder / "images").exists():
        return
    if path.exists():
        reason = "of another run or measurement" if whole else "damaged"
        console.print(f"{path}: {reason}, drawn again")

    images, batch = store_of(job, folder, of).read(), job.sampling.batch
    features = f"{row['features']['name']} features {row['features']['weights']}"
    name, value = next((VALUES[k].label, v) for k, v in row["metrics"].items() if k in VALUES)
    title = f"{job.name}, {name} {value:.4g} ({features}, {row['images']} images)"
    rows = {title: images[:batch]}

    # The float model's images of the same noise, where there is one.
    if job.recipe is not None and job.weights.path is not None:
        net = job.model.build()
        job.weights.load(job.model, net)
        pixels = sample_group(
            Denoiser(net.to(processes.device).eval(), job.model),
            job.sampler,
            range(batch),
            seed=job.sampling.seed,
            device=processes.device,
            truncate=job.sampling.truncate,
        )
        rows = {"float, same noise": pixels, **rows}

    figures.sample_grid(rows, path)
    figures.sign(path, f"{of}_{row['fingerprints']['measure']}")


def print_row(job: Experiment, rows: list[dict[str, Any]]) -> None:
    """Print what came out, as a small table, and where it lies."""
    if not rows:
        export = job.config["fit"].get("export")
        also = f", {export}" if export else ""
        console.print(f"{job.name}: weights in {job.folder / 'weights.safetensors'}{also}")
        return

    # 1. The row, the float model's and those of real images.
    (row,) = rows
    features = row["features"]
    names = {key: value.label for key, value in VALUES.items() if key in row["metrics"]}
    lines = [
        [r["name"], _count(r), *(r["metrics"].get(key) for key in names)]
        for r in [row, *_float_rows(job, row)]
    ]

    for kind, real in real_metrics(row).items():
        lines.append([REAL_NAMES[kind], real["images"], *(real[key] for key in names)])

    title = f"{features['name']} features ({features['weights']})"
    print_table(title, ["", "images", *names.values()], lines)
    if "few_for" in row:
        console.print(
            f"warning: (few) the Frechet distance of {row['images']} images by {row['few_for']}"
            " features is mostly bias: compare it with sets of as many images only, and for a"
            f" result take sampler.images={10 * row['few_for']} or more",
        )

    # 2. Where it lies.
    file = rows_file(job)
    console.print(f"row      {file}")
    for path in sorted(file.parent.rglob("grid.png")):
        console.print(f"samples  {path}")
    if (job.folder / "intervals.png").exists():
        console.print(f"steps    {job.folder / 'intervals.png'}")


def _count(row: dict[str, Any]) -> str:
    """Return the number of images, with a mark if they are few for FID."""
    return f"{row['images']} (few)" if "few_for" in row else str(row["images"])


def _float_rows(job: Experiment, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the float model's rows that compare: same weights, sampler, features, reference."""
    name = f"{job.config['model']['label']}_fp"
    folder = job.folder.parents[1] / name / f"seed{job.seed}" / job.sample_name

    rows = read_rows(folder / "metrics.json")
    alike = ("weights", "autoencoder", "features", "images", "reference")
    same = [r for r in rows if all(r.get(key) == row.get(key) for key in alike)]
    sampler = _way_of_sampling(row)
    return [r for r in same if r["name"] != row["name"] and _way_of_sampling(r) == sampler]


def _way_of_sampling(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row's sampler computes, whatever runs it; None where an older row lacks it."""
    sampler = parts_of("sampler", defaultdict(lambda: None, row["config"]["sampler"]))
    return {key: value for key, value in sampler.items() if key not in ("engine", "batch")}
