"""Measuring what a figure shows: networks are found, or trained, and handed to `analysis`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_exp.analysis import activations, alone, quantizers, samples, trajectory
from tdq_exp.config.compose import compose
from tdq_exp.config.naming import FIT_RECORD, PACKED
from tdq_exp.data.images import Data
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import fit_stage, pipeline
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.finished_run import load
from tdq_exp.fit.options import BAKED
from tdq_exp.report.cells import Cell, fit_changes
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.report.figure_numbers import line_label
from tdq_exp.runtime import environment, files
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import console
from tdq_exp.runtime.tracking import Tracker

NAMED = 6  # quantizers whose ranges are drawn
RANGES = ("low", "q01", "q99", "high", "grid_low", "grid_high", "bits")

# Label of a network -> what `quantizers.measure` returns.
Seen = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass
class Network:
    """A network that a figure is about.

    Args:
        label: of its line.
        run: name of its run.
        job: that it is of.
        net: in eval mode; quantized ones baked.
        fit: fingerprint of its fit, or the hash of a float model's weights.
    """

    label: str
    run: str
    job: Experiment
    net: nn.Module
    fit: str


def measure(
    figure: FigureManifest, scale: str, cells: Sequence[Cell], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the numbers of a figure.

    Args:
        figure: the manifest.
        scale: of the cells.
        cells: with their rows.
        options: of the command: `nets`, `run`, `go`.

    Raises:
        ValueError: if networks would have to be trained at the paper's scale without a GPU.
    """
    record: dict[str, Any] = {"figure": figure.name, "scale": scale, "columns": {}}
    for name in dict.fromkeys(cell.column for cell in cells):
        of_column = [cell for cell in cells if cell.column == name]
        record["columns"][name] = _column(figure, of_column, options)

    about = {"images": figure.images, "steps": figure.steps, "seed": 0}
    return {**record, "about": {**about, **environment.environment()}}


def _column(
    figure: FigureManifest, cells: Sequence[Cell], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the numbers of one model."""
    processes = Processes(cpu=True)
    try:
        # The float model always has a network; quantized ones may be missing.
        float_cell, quantized = cells[0], cells[1:]
        job = jobs.build(compose(float_cell.overrides), source=False)
        net, weights = fit_stage.float_net(job, processes)
        float_network = Network(line_label(float_cell), float_cell.run, job, net, weights)

        networks, missing = [], []
        for cell in quantized:
            network = _network(cell, options, processes)
            if network is None:
                missing.append(line_label(cell))
            else:
                networks.append(network)

        numbers = _numbers(figure, float_network, networks)
        return {
            "model": job.config["model"]["label"],
            "weights": weights,
            **numbers,
            "missing": missing,
        }
    finally:
        processes.close()


def _network(cell: Cell, options: argparse.Namespace, processes: Processes) -> Network | None:
    """Return the network of a cell: where it lies, or trained; None if there is none.

    One of another fit than the cell asks for is passed over, with a line.
    """
    elsewhere = options.nets / "runs" / cell.run / cell.folder.name

    for folder in (cell.folder, elsewhere):
        for path in (folder / BAKED, folder / PACKED):
            if not path.exists():
                continue
            job, net = load(path if path.name == PACKED else folder)
            changes = fit_changes(cell, job.config) + _other_nets(cell, folder)
            if changes:
                console.print(f"stale {path}: {'; '.join(changes)}")
                continue
            return _network_of(cell, job, net, folder)

    if not options.run:
        return None

    console.print(f"{cell.run}: no network in {cell.folder}; training one")
    try:
        _train(cell, elsewhere, options, processes)
    except (ValueError, OSError) as error:
        console.print(f"{cell.run}: {error}")
        return None

    return _network_of(cell, *load(elsewhere), elsewhere)


def _other_nets(cell: Cell, folder: Path) -> list[str]:
    """Return that a fit is of other float weights than a cell's, if both are known."""
    record = files.read_json(folder / FIT_RECORD)
    wanted, found = cell.contents.get("weights"), record and record.get("facts", {}).get("weights")
    return [] if None in (wanted, found) or wanted == found else [f"weights: {found} -> {wanted}"]


def _network_of(cell: Cell, job: Experiment, net: nn.Module, folder: Path) -> Network:
    """Return a network that was found, sampled as its cell says: its fit knows of no sampler.

    The record of a fit holds the sampler of the command that happened to be the first.
    """
    asked = jobs.build(compose(cell.overrides), source=False)
    job = dataclasses.replace(job, sampler=asked.sampler, sampling=asked.sampling)
    fit = _fit_fingerprint(folder, cell)
    return Network(line_label(cell), cell.run, job, net.eval(), fit)


def _train(cell: Cell, folder: Path, options: argparse.Namespace, processes: Processes) -> None:
    """Fit the network of a cell into a folder of networks; nothing is sampled or measured.

    Raises:
        ValueError: at the paper's scale without a GPU, or if the data is not there.
    """
    if cell.config["protocol"]["scale"] == "paper" and not (
        torch.cuda.is_available() or options.go
    ):
        raise ValueError("this is the paper's scale and there is no GPU: insist with --go")

    overrides = [o for o in cell.overrides if not o.startswith("out=")]
    job = dataclasses.replace(jobs.build(compose(overrides)), folder=folder.resolve())
    data: Data = pipeline.load_data(job, processes)

    tracker = Tracker("none", "", job.name, job.folder, job.config)
    fit_stage.run_fit(job, data, processes, tracker)


def _fit_fingerprint(folder: Path, cell: Cell) -> str:
    """Return the fingerprint of a fit, and say so if its row is of another one.

    Raises:
        ValueError: if there is no record beside the network.
    """
    record = files.read_json(folder / FIT_RECORD)
    if record is None:
        raise ValueError(f"{folder}: holds a network without its record, fit.json")

    found = str(record["fingerprint"])
    of_row = found if cell.row is None else cell.row["fingerprints"]["fit"]
    if of_row != found:
        console.print(f"{cell.run}: its row is of another fit, {of_row}")
    return found


def _numbers(
    figure: FigureManifest, float_network: Network, networks: Sequence[Network]
) -> dict[str, Any]:
    """Return what a figure shows of the networks of one model."""
    if figure.kind == "activations":
        job, net = float_network.job, float_network.net
        return activations.measure(job, net, figure.images, figure.steps)
    if figure.kind == "grids":
        return {"runs": _strips(figure, [float_network, *networks])}

    # All quantized networks are shown the same x_t.
    path = trajectory.float_trajectory(
        float_network.job, float_network.net, figure.images, figure.steps
    )
    seen = {
        network.label: quantizers.measure(network.job, network.net, path) for network in networks
    }
    reduced = REDUCE[figure.kind](seen)

    runs = {}
    for network in networks:
        about = {"run": network.run, "fit": network.fit}
        runs[network.label] = {**about, **reduced[network.label]}
        if figure.kind == "layers":
            runs[network.label] |= alone.measure(
                network.job, network.net, figure.images, figure.steps
            )
    return {"t": path.t, "runs": runs}


def _strips(figure: FigureManifest, networks: Sequence[Network]) -> dict[str, Any]:
    """Return the first images of every network, side by side."""
    runs = {}
    for network in networks:
        images = samples.draw(network.job, network.net, figure.images)
        runs[network.label] = {
            "run": network.run,
            "fit": network.fit,
            "steps": network.job.sampling.steps,
            "size": images.shape[1],
            "png": samples.strip(images),
        }
    return runs


def _errors(seen: Seen) -> dict[str, Any]:
    """Return the mean over quantizers of truncation and rounding error, at every t."""
    reduced = {}
    for label, network in seen.items():
        every = list(network["quantizers"].values())
        reduced[label] = {
            "truncation": _mean(quantizer["truncation"] for quantizer in every),
            "rounding": _mean(quantizer["rounding"] for quantizer in every),
            "quantizers": len(every),
        }
    return reduced


def _mean(curves: Iterable[Sequence[float]]) -> list[float]:
    """Return the mean of curves of one length, point by point."""
    points = zip(*curves, strict=True)
    return trajectory.rounded([sum(point) / len(point) for point in points])


def _ranges(seen: Seen) -> dict[str, Any]:
    """Return ranges over t, of the quantizers whose input's range changes most in the last network.

    All networks show the same quantizers. Inputs that are a function of t alone are left out.
    """
    last = list(seen.values())[-1]["quantizers"] if seen else {}
    last = {name: q for name, q in last.items() if q["role"] not in activations.TIME}
    moving = sorted(last, key=partial(_movement, last), reverse=True)[:NAMED]

    reduced = {}
    for label, network in seen.items():
        every = network["quantizers"]
        shown = {name: {key: every[name][key] for key in RANGES} for name in moving}
        reduced[label] = {"quantizers": shown}
    return reduced


def _movement(quantizers_of: Mapping[str, Any], name: str) -> float:
    """Return the largest over the smallest width of a quantizer's input over t."""
    edges = zip(quantizers_of[name]["q01"], quantizers_of[name]["q99"], strict=True)
    widths = [high - low for low, high in edges]
    return max(widths) / max(min(widths), 1e-12)


def _layers(seen: Seen) -> dict[str, Any]:
    """Return the signal-to-quantization-noise of every quantizer over t, to a tenth."""
    return {
        label: {
            "sqnr": {
                name: [round(value, 1) for value in quantizer["sqnr"]]
                for name, quantizer in network["quantizers"].items()
            }
        }
        for label, network in seen.items()
    }


REDUCE = {"errors": _errors, "ranges": _ranges, "layers": _layers}
