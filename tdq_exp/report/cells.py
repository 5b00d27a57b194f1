"""Tables: a manifest of experiments, filled from the rows of their runs, as Markdown and LaTeX.

    python -m tdq_exp table table1 --scale digits          render from the rows that are there
    python -m tdq_exp table table1 --scale digits --run    first run every cell that has no row

The command's options, and how cells are run, are in `table_run`; what a column says is in `tabulate`. The same rows give
the same bytes. A table has a column for each model. A cell is `missing` if there is no row; its row is stale (a dagger)
if it was made with another configuration or another float net than the experiment has now, and short (a double dagger) if
it has fewer images than the experiment asks for.

One column is one protocol: its rows that differ in a field of `PROTOCOL` are refused, and no table is written, because a
reader compares whatever stands in one column. Two exceptions. A short row may differ in its number of images, which its
mark says; the distance grows as the images get fewer, so it takes no part in any gap. And the float model has no
checkpoints to choose from, so that `report` is compared between the quantized rows alone. A stale row is no exception:
its mark says that it is old, not that it was measured in another way.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdq_exp.config import assets, schema
from tdq_exp.runtime import files, stage

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
    "autoencoder",
)


@dataclass(frozen=True)
class Line:
    """A line of a table: an experiment, by its name without the model, and what was published for it.

    Args:
        method, bits: as they are printed.
        experiment: its name without the model.
        sampler_seeds: one cell for each.
        overrides: of its command.
        fid: column -> what was published.
        source: where.
    """

    method: str
    bits: str
    experiment: str
    sampler_seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    fid: Mapping[str, float] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        if bool(self.fid) != (self.source is not None):
            raise ValueError(f"{self.experiment}: `fid` and `source` go together")


@dataclass(frozen=True)
class Column:
    """A column of a table: a model, to which all of its lines are done.

    Args:
        scales: scale -> the model's name in experiments; a table has no such column at another scale.
        published: what the published numbers are measured on.
        suffix: of the names of its quantized experiments, where they differ from another column's.
    """

    scales: Mapping[str, str]
    published: str
    suffix: str = ""


@dataclass(frozen=True)
class Manifest:
    """A file of `configs/table`: the float model and the lines below it, for the models of each scale."""

    name: str
    title: str
    columns: Mapping[str, Column]
    float_model: Line
    lines: tuple[Line, ...]
    plot_weight_bits: int | None = (
        None  # also draw the distance over the activations' bits at this width of the weights
    )

    def __post_init__(self) -> None:
        for line in self.lines:
            unknown = set(line.fid) - set(self.columns)
            if unknown:
                raise ValueError(f"{line.experiment}: `fid` names no column: {', '.join(sorted(unknown))}")

    def models(self, scale: str) -> dict[str, str]:
        """Column -> model, of the columns that there are at a scale."""
        return {name: column.scales[scale] for name, column in self.columns.items() if scale in column.scales}


@dataclass(frozen=True)
class Cell:
    """One experiment at one sampler seed: what is asked for, and the row that was found.

    Args:
        column, line: where it stands.
        experiment: its whole name.
        overrides: of the command that makes it.
        config: what these compose to, as plain values.
        folder: of the fit.
        sample: folder of the sampled set inside of that.
        images: how many the experiment asks for by itself.
        nets: row's key -> hash of the float net, or part of one, that the command would take, where that is known
            without a download.
        row: its row, or one of the same sampler with fewer images, or None.
    """

    column: str
    line: Line
    experiment: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    folder: Path
    sample: str
    images: int
    nets: Mapping[str, str] = field(default_factory=dict)
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
        others = {name: mark for name, mark in self.nets.items() if self.row.get(name) != mark}
        nets = [f"float {name}: {self.row.get(name)} -> {mark}" for name, mark in others.items()]
        return nets + stage.differences(_compared(self.row["config"]), _compared(self.config))


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
            "columns": {name: Column(**column) for name, column in content["columns"].items()},
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
        found = (files.read_json(path) or {"rows": []})["rows"]
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
    from tdq_exp.experiment.build import parts_of  # it imports torch

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
    for key in PROTOCOL:
        first: tuple[str, Any] | None = None
        for cell in cells:
            exempt = (key == "images" and cell.short) or (key == "report" and not cell.config["method"]["quantized"])
            if cell.row is None or exempt:
                continue
            value = select(cell.row, key)
            first = first or (cell.name, value)
            if value != first[1]:
                raise ValueError(
                    f"rows of two protocols in one column: {key} is {first[1]} in {first[0]} and {value} in"
                    f" {cell.name}; run one of them as the other, or move its row away"
                )


def select(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
