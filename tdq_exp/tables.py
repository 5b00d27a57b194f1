"""Tables: a manifest of experiments, filled from the rows of their runs, as Markdown and LaTeX.

    python -m tdq_exp.tables table1 --scale digits          render from the rows that are there
    python -m tdq_exp.tables table1 --scale digits --run    first run every cell that has no row

The command's options, and how cells are run, are in `table_run`. The same rows give the same bytes. A cell is `missing` if there is no row; its row is stale (a dagger) if it was made
with another configuration or another float net than the experiment has now, and short (a double dagger) if it has fewer images than the
experiment asks for.

One table is one protocol: rows that differ in a field of `PROTOCOL` are refused, and no table is written, because a
reader compares whatever stands in one column. Two exceptions. A short row may differ in its number of images, which its
mark says; the distance grows as the images get fewer, so it takes no part in any gap. And the float model has no
checkpoints to choose from, so that `report` is compared between the quantized rows alone. A stale row is no exception:
its mark says that it is old, not that it was measured in another way.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_exp import assets, record, schema
from tdq_exp.rendering import SHORT, STALE, Table

SAMPLER = ("steps", "spacing", "eta", "clip", "offset", "final_alpha_one", "truncate")
PROTOCOL = (
    "features.name",
    "features.weights",
    "images",
    "config.sampler.method._target_",
    *(f"config.sampler.{key}" for key in SAMPLER),
    "report",
    "reference.content",
    "reference.images",
    "reference.protocol",
    "weights",
)


@dataclass(frozen=True)
class Line:
    """A line of a table: an experiment, by its name without the model, and what was published for it.

    Args:
        method, bits: as they are printed.
        experiment: its name without the model.
        sampler_seeds: one cell for each.
        overrides: of its command.
        fid, source: what was published, and where.
    """

    method: str
    bits: str
    experiment: str
    sampler_seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    fid: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if (self.fid is None) != (self.source is None):
            raise ValueError(f"{self.experiment}: `fid` and `source` go together")


@dataclass(frozen=True)
class Manifest:
    """A file of `configs/table`: the float model and the lines below it, for the model of each scale."""

    name: str
    title: str
    scales: dict[str, str]
    published: str
    float_model: Line
    lines: tuple[Line, ...]
    plot_weight_bits: int | None = (
        None  # also draw the distance over the activations' bits at this width of the weights
    )


@dataclass(frozen=True)
class Cell:
    """One experiment at one sampler seed: what is asked for, and the row that was found.

    Args:
        line: its line.
        experiment: its whole name.
        overrides: of the command that makes it.
        config: what these compose to, as plain values.
        folder: of the fit.
        sample: folder of the sampled set inside of that.
        images: how many the experiment asks for by itself.
        weights: hash of the float net that the command would take, where that is known without a download.
        row: its row, or one of the same sampler with fewer images, or None.
    """

    line: Line
    experiment: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    folder: Path
    sample: str
    images: int
    weights: str | None = None
    row: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        seed = self.config["sampler"]["seed"]
        return self.experiment + (f" sampler.seed={seed}" if seed else "")

    @property
    def done(self) -> bool:
        """Is the row the one that the command makes, and not one of fewer images in its place?"""
        return self.row is not None and self.row["images"] == self.config["sampler"]["images"]

    @property
    def short(self) -> bool:
        return self.row is not None and self.row["images"] < self.images

    @property
    def changes(self) -> list[str]:
        """What the configuration has become since the row was made; empty if nothing changed."""
        if self.row is None:
            return []
        other_net = self.weights is not None and self.row["weights"] != self.weights
        nets = [f"float weights: {self.row['weights']} -> {self.weights}"] if other_net else []
        return nets + record.differences(_compared(self.row["config"]), _compared(self.config))


def read_manifest(name: str) -> Manifest:
    """The manifest `configs/table/<name>.yaml`.

    Raises:
        ValueError: if there is none, or if it has wrong keys or a published number without a source.
    """
    folder = assets.configs() / "table"
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise ValueError(
            f"{name}: no such table (there are: {', '.join(sorted(f.stem for f in folder.glob('*.yaml')))})"
        )
    content: Any = schema.read_yaml(path)
    try:
        content |= {
            "float_model": _line(content["float_model"]),
            "lines": tuple(_line(line) for line in content["lines"]),
        }
        return Manifest(name=name, **content)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _line(content: dict[str, Any]) -> Line:
    lists: dict[str, Any] = {key: tuple(content[key]) for key in ("sampler_seeds", "overrides") if key in content}
    return Line(**{**content, **lists})


def find(cell: Cell) -> Cell:
    """The cell with its row: the one that its command makes, else the largest that differs in the images alone.

    Raises:
        ValueError: if a file of rows is damaged.
    """

    def rows(path: Path) -> list[dict[str, Any]]:
        found = (record.read(path) or {"rows": []})["rows"]
        return [row for row in found if row["config"]["eval"]["label"] == cell.config["eval"]["label"]]

    exact = rows(cell.folder / cell.sample / "metrics.json")
    sampler = _compared(cell.config)["sampler"]
    fewer = [
        row
        for path in sorted(cell.folder.glob("*/metrics.json"))
        for row in rows(path)
        if row["images"] < cell.config["sampler"]["images"]
        and _compared(row["config"])["sampler"] == sampler
        and row["report"] == cell.config["fit"]["report"]
    ]
    found = exact[0] if exact else max(fewer, key=lambda row: row["images"], default=None)
    return dataclasses.replace(cell, row=found)


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a row stale when it changes: everything that its fingerprints read, but the number of images."""
    from tdq_exp.job import parts_of  # it imports torch

    groups = ["model", "sampler"]
    if config["method"]["quantized"]:
        groups += ["bits", "weight", "act", "tdq", "plan", "habits", "fit"]
        groups += ["calibration"] if config["fit"]["kind"] == "ptq" else []
    # An older row may lack a key that there is now: None, and so a change.
    parts = {group: parts_of(group, defaultdict(lambda: None, config[group])) for group in groups}
    del parts["sampler"]["images"]
    parts["eval"] = {key: config["eval"].get(key) for key in ("metrics", "batch", "reference_images")}
    parts["eval"]["features"] = config["eval"]["features"]["_target_"]  # their weights are a path
    return json.loads(json.dumps(parts))


def check_protocol(cells: Sequence[Cell]) -> None:
    """Refuses rows that must not stand in one column; see the module for the exceptions.

    Raises:
        ValueError: names the field and both values.
    """
    for field in PROTOCOL:
        first: tuple[str, Any] | None = None
        for cell in cells:
            exempt = (field == "images" and cell.short) or (
                field == "report" and not cell.config["method"]["quantized"]
            )
            if cell.row is None or exempt:
                continue
            value = _select(cell.row, field)
            first = first or (cell.name, value)
            if value != first[1]:
                raise ValueError(
                    f"rows of two protocols in one column: {field} is {first[1]} in {first[0]} and {value} in"
                    f" {cell.name}; run one of them as the other, or move its row away"
                )


def _select(row: dict[str, Any], field: str) -> Any:
    value: Any = row
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def tabulate(manifest: Manifest, scale: str, cells: Sequence[Cell], overrides: Sequence[str] = ()) -> Table:
    """Fills a table from the cells' rows.

    Args:
        manifest: the table.
        scale: for the title.
        cells: of every line, with their rows.
        overrides: what the cells were asked for with, for the footer.

    Raises:
        ValueError: if the rows are of more than one protocol.
    """
    check_protocol(cells)
    of = {line: [cell for cell in cells if cell.line == line] for line in (manifest.float_model, *manifest.lines)}
    reference = of[manifest.float_model]
    name = next((c.row["features"]["name"] for c in cells if c.row), cells[0].config["eval"]["label"])
    inception = name.startswith("inception")
    headers = [
        ("method", ""),
        ("bits W/A", ""),
        ("FID", "") if inception else ("Frechet distance", f"{name} features"),
        ("IS", "") if inception else ("inception-style score", f"{name} features"),
        ("gap to float", ""),
        ("published", manifest.published),
    ]
    groups = [[_texts(manifest.float_model, reference, []), _held_out(reference)]]
    for line in manifest.lines:
        if len(groups) == 1 or groups[-1][0][1] != line.bits:
            groups.append([])
        groups[-1].append(_texts(line, of[line], reference))
    return Table(f"{manifest.title}, scale {scale}", headers, groups, _notes(manifest, cells, overrides))


def over_bits(manifest: Manifest, cells: Sequence[Cell]) -> tuple[dict[str, dict[int, float]], float | None]:
    """(method -> bits of activations -> distance, the float model's), of the lines of one width of the weights.

    Stale and short rows are left out: a picture has no marks.
    """
    found: dict[str, dict[int, float]] = {}

    def mean(line: Line) -> float | None:
        values = _values([c for c in cells if c.line == line and not c.changes and not c.short], "fid")
        return sum(values) / len(values) if values else None

    for line in manifest.lines:
        weight, act = (int(b) for b in line.bits.split("/"))
        value = mean(line)
        if weight == manifest.plot_weight_bits and value is not None:
            found.setdefault(line.method, {})[act] = value
    return found, mean(manifest.float_model)


def distance_name(cells: Sequence[Cell]) -> str:
    """`FID`, or the distance with the name of its features."""
    name = next((c.row["features"]["name"] for c in cells if c.row), cells[0].config["eval"]["label"])
    return "FID" if name.startswith("inception") else f"Frechet distance ({name} features)"


def _used(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that a line shows: short ones only if there are no others."""
    found = [cell for cell in cells if cell.row]
    return [cell for cell in found if not cell.short] or found


def _values(cells: Sequence[Cell], metric: str) -> list[float]:
    values = [cell.row["metrics"].get(metric) for cell in _used(cells) if cell.row]
    return [] if None in values else values


def _texts(line: Line, cells: Sequence[Cell], reference: Sequence[Cell]) -> list[str]:
    used = _used(cells)
    seeds = "" if len(cells) == 1 else f", mean (min..max) of {len(used)} sampling seeds"
    if 0 < len(used) < len(cells):
        seeds += f" out of {len(cells)}"
    marks = (STALE if any(c.changes for c in used) else "") + (SHORT if any(c.short for c in used) else "")

    def shown(metric: str) -> str:
        values = _values(cells, metric)
        if not values:
            return "-" if used else "missing"
        spread = f" ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.2f}{spread}{marks}"

    ours, theirs = _values(cells, "fid"), _values(reference, "fid")
    gap = "-"
    if ours and theirs and not any(c.short for c in (*used, *_used(reference))):
        gap = f"{sum(ours) / len(ours) - sum(theirs) / len(theirs):+.2f}"
    published = "-" if line.fid is None else f"{line.fid:.2f}"
    return [line.method + (seeds if used else ""), line.bits, shown("fid"), shown("isc_mean"), gap, published]


def _held_out(reference: Sequence[Cell]) -> list[str]:
    """Held-out real images in the place of generated ones: what a perfect model would get."""
    held_out = next((cell.row["held_out"] for cell in _used(reference) if cell.row), None)
    if held_out is None:
        return ["real images, held out", "-", "missing", "missing", "-", "-"]
    numbers = ["-" if held_out.get(key) is None else f"{held_out[key]:.2f}" for key in ("fid", "isc_mean")]
    return [f"real images, held out ({held_out['images']} images)", "-", *numbers, "-", "-"]


def _notes(manifest: Manifest, cells: Sequence[Cell], overrides: Sequence[str]) -> list[str]:
    found = [cell for cell in cells if cell.row]

    def listed(field: str, among: Sequence[Cell] = found) -> str:
        values = {_select(cell.row, field) for cell in among if cell.row}
        return ", ".join(sorted("unknown" if v is None else str(v) for v in values)) or "-"

    quantized = [cell for cell in found if cell.config["method"]["quantized"]]
    sampler = listed("config.sampler.method._target_").rsplit(".", 1)[-1]
    settings = ", ".join(f"{key} {listed(f'config.sampler.{key}')}" for key in SAMPLER)
    stale = sum(bool(c.changes) for c in found)
    notes = [
        f"Images per cell: {listed('images')}. Sampler: {sampler}, {settings}.",
        f"Features: {listed('features.name')}, weights {listed('features.weights')}."
        f" Reference: {listed('reference.images')} training images, content {listed('reference.content')},"
        f" {listed('reference.protocol')}.",
        f"Float weights: {listed('weights')}. Checkpoint of the quantized lines: {listed('report', quantized)}."
        f" Seeds of their training: {listed('seed', quantized)}.",
        f"Commits: {listed('environment.commit')}. Machines: {listed('environment.machine')}.",
    ]
    notes = [*notes, "Gaps are to the float model's mean in our own column."] if found else ["No rows yet."]
    notes.append(
        f"Of {len(cells)} cells {len(cells) - len(found)} missing; {stale} stale ({STALE}: made with another configuration than the"
        f" experiment's); {sum(c.short for c in found)} short ({SHORT}: fewer images than the experiment asks for, no gap)."
    )
    if overrides:
        notes.append(f"Asked for with {' '.join(overrides)}.")
    sources = sorted({line.source for line in (manifest.float_model, *manifest.lines) if line.source})
    if sources:
        notes.append(f"Published: {'; '.join(sources)}.")
    return notes


if __name__ == "__main__":
    from tdq_exp.table_run import main

    sys.exit(main())
