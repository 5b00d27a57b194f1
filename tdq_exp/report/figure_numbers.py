"""Numbers of figures: the file that keeps them, and those that come from rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdq_exp.report import columns, spread
from tdq_exp.report.cells import Cell
from tdq_exp.report.figure_manifest import FigureManifest
from tdq_exp.runtime import files

FLOAT = "float"


def numbers_file(figure: str, scale: str, out: Path) -> Path:
    """Return the file that a figure's numbers lie in.

    Args:
        figure: its name.
        scale: of the runs.
        out: folder of results.
    """
    return out / "numbers" / f"{figure}-{scale}.json"


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a figure's numbers as JSON: in their own order, a list of numbers on one line."""
    text = json.dumps(record, indent=1, allow_nan=False)
    files.write_text(path, re.sub(r"\[[^\[\]{}]*\]", _one_line, text) + "\n")


def _one_line(match: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]")


def require_asked(file: Path, record: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Refuse numbers of other runs than a figure asks for: its manifest or table has changed.

    Args:
        file: of the numbers, for the message.
        record: the numbers.
        cells: that the manifest asks for now.

    Raises:
        ValueError: naming every line that is of another run.
    """
    asked: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        asked.setdefault((cell.column, line_label(cell)), set()).add(cell.run)

    faults = []
    for column, numbers in record["columns"].items():
        for label, measured in numbers.get("runs", {}).items():
            wanted = asked.get((column, label), set())
            if measured["run"] not in wanted:
                instead = " or ".join(sorted(wanted)) or "no such line"
                faults.append(f"{column}, {label} is of {measured['run']}, asked for is {instead}")
    if faults:
        raise ValueError(f"{file}: {'; '.join(faults)}; measure it again with --measure")


def distances(figure: FigureManifest, scale: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the distance of every line at every number of sampling steps, or of updates.

    Stale and short rows are left out and count as missing. The float model is at 0 updates.

    Args:
        figure: the manifest.
        scale: of the cells.
        cells: with their rows.

    Returns:
        `columns`: column -> `model`, `label` of the distance, `lines` (line -> steps or updates ->
        distance, run, images, seed, fingerprint and commit; over updates also half the width of the
        distance's interval, and the validation losses as [update, loss]), and `missing` cells.
    """
    over_updates = figure.kind == "length"
    unit = "updates" if over_updates else "steps"
    record: dict[str, Any] = {"figure": figure.name, "scale": scale, "columns": {}}

    for name in dict.fromkeys(cell.column for cell in cells):
        of_column = [cell for cell in cells if cell.column == name]
        record["columns"][name] = {
            "model": columns.model_label(of_column),
            "label": columns.distance_name(of_column),
            "lines": _lines(of_column, over_updates),
            "missing": [
                f"{line_label(c)}, {_updates(c) if over_updates else _steps(c)} {unit}"
                for c in of_column
                if not _good(c)
            ],
        }
    return record


def has_curve(record: Mapping[str, Any]) -> bool:
    """Return whether a line of a figure of rows has more than one point."""
    columns = record["columns"].values()
    return any(len(line) > 1 for column in columns for line in column["lines"].values())


def line_label(cell: Cell) -> str:
    """Return how a figure calls a line: `LSQ + TDQ W4A4`."""
    if not cell.config["method"]["quantized"]:
        return FLOAT
    weight, act = cell.line.bits.split("/")
    return f"{cell.line.label} W{weight}A{act}"


def _lines(cells: Sequence[Cell], over_updates: bool) -> dict[str, dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = {}
    for cell in cells:
        of_line = lines.setdefault(line_label(cell), {})
        row = cell.row
        if row is None or not _good(cell):
            continue

        point = of_line[str(_updates(cell) if over_updates else _steps(cell))] = {
            "distance": row["metrics"]["fid"],
            "half_width": spread.interval([cell]),
            "run": row["name"],
            "images": row["images"],
            "seed": row["seed"],
            "fingerprint": row["fingerprints"]["measure"],
            "commit": row["environment"]["commit"],
        }
        if over_updates:
            fit = files.read_json(cell.folder / "fit.json") or {}
            point["validation"] = fit.get("facts", {}).get("validation", [])
    return lines


def _updates(cell: Cell) -> int:
    """Return the length of a cell's training; 0 of the float model, which is given."""
    return int(cell.config["fit"]["updates"]) if cell.config["method"]["quantized"] else 0


def _steps(cell: Cell) -> int:
    return int(cell.config["sampler"]["steps"])


def _good(cell: Cell) -> bool:
    return cell.row is not None and not cell.changes and not cell.short
