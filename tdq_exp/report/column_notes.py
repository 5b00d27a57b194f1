"""What a table says below itself: how its columns were made and measured, in what time."""

from __future__ import annotations

from collections.abc import Sequence

from tdq_exp.config.experiments import option_of
from tdq_exp.experiment.engines import SIMULATED
from tdq_exp.experiment.places import environments, machine_of
from tdq_exp.report.cells import Cell
from tdq_exp.report.protocol import SAMPLER, select


def time_note(cells: Sequence[Cell]) -> str:
    """Return how long the rows took, each fit counted once."""
    seconds = {"fit": 0.0, "sample": 0.0, "measure": 0.0}
    fits = set()

    for cell in cells:
        row = cell.row or {}
        fit = row.get("fingerprints", {}).get("fit")
        for stage, value in (row.get("seconds") or {}).items():
            if stage != "fit" or fit not in fits:
                seconds[stage] += value
        fits.add(fit)

    hours = {stage: total / 3600 for stage, total in seconds.items()}
    return (
        f"Time of the rows above: {sum(hours.values()):.1f} hours; fits {hours['fit']:.1f},"
        f" sampling {hours['sample']:.1f}, measuring {hours['measure']:.1f}."
    )


def column_notes(cells: Sequence[Cell], prefix: str = "") -> list[str]:
    """Return how a column's rows were sampled and measured, from what, where.

    Args:
        cells: of the column.
        prefix: what each note begins with, where there are several columns.
    """
    filled = [cell for cell in cells if cell.row]
    if not filled:
        return [prefix + ("no rows yet." if prefix else "No rows yet.")]

    def listed(key: str, among: Sequence[Cell] = filled) -> str:
        values = {select(cell.row, key) for cell in among if cell.row}
        return ", ".join(sorted("unknown" if v is None else str(v) for v in values)) or "-"

    quantized = [cell for cell in filled if cell.config["method"]["quantized"]]

    sampler = listed("config.sampler.method._target_").rsplit(".", 1)[-1]
    settings = ", ".join(f"{key} {listed(f'config.sampler.{key}')}" for key in SAMPLER)
    autoencoder = listed("autoencoder")
    autoencoder_text = "" if autoencoder == "unknown" else f", autoencoder {autoencoder}"

    engines = {str(cell.row.get("engine", SIMULATED)) for cell in filled if cell.row}
    notes = [
        f"Images per cell: {listed('images')}. Sampler: {sampler}, {settings}.",
        f"Features: {listed('features.name')}, weights {listed('features.weights')}."
        f" Reference: {listed('reference.images')} training images,"
        f" content {listed('reference.content')}, {listed('reference.protocol')}.",
        f"Float weights: {listed('weights')}{autoencoder_text}."
        f" Checkpoint of the quantized lines: {listed('report', quantized)}."
        f" Seeds of their training: {listed('seed', quantized)}.",
        f"Plan of the quantized lines: {options_of(cells, 'plan') or 'all'}."
        + (f" Calibration: {sets}." if (sets := options_of(cells, "calibration")) else ""),
        _places(filled),
    ]
    if engines != {SIMULATED}:
        notes.append(f"Engines: {'; '.join(sorted(engines))}.")
    return [prefix + note for note in notes]


def _places(cells: Sequence[Cell]) -> str:
    """Return the commits and machines of rows, of their fits and images too."""
    places = [place for cell in cells if cell.row for place in environments(cell.row)]
    commits = sorted({str(place["commit"]) for place in places})
    machines = sorted({machine_of(place) for place in places})
    return f"Commits: {', '.join(commits)}. Machines: {'; '.join(machines)}."


def options_of(cells: Sequence[Cell], group: str) -> str:
    """Return the options of a group that the quantized lines of a column choose."""
    chosen = [
        option_of(group, str(cell.config[group]["label"])) or "all"
        for cell in cells
        if cell.config["method"]["quantized"] and (group == "plan" or cell.config[group]["label"])
    ]
    return ", ".join(dict.fromkeys(chosen))
