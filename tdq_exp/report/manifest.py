"""Manifests: what a table asks for, in the words of a command line.

A file of `configs/table` names a float model, lines and columns. A line is a list of choices, an
option of some groups each; a column adds its model, and whatever else it is about:

    lines:    {label: LSQ + TDQ, bits: w4a4, method: lsq, tdq: temporal}
    columns:  ldm: {scales: {small: {model: ldm_small, plan: float_attention}}, published: ...}

Together they are the command of a cell, `model=ldm_small bits=w4a4 method=lsq tdq=temporal
plan=float_attention`. Any group may be chosen (`calibration`, `plan`, `habits`, ...), and a line
may hold `overrides` of single values besides. What all quantized lines share is written once, and
a line that names the same group wins:

    choices:  {plan: release}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdq_exp.config import assets

FLOAT_BITS = "32/32"
NOT_CHOICES = ("label", "seeds", "sampler_seeds", "overrides", "fid", "source")


@dataclass(frozen=True)
class Line:
    """A line of a table, and what was published for it.

    Args:
        label: the method, as it is printed.
        choices: group -> option, of its command.
        seeds: scale -> seeds of training, one cell for each; seed 0 at a scale that is not named.
        sampler_seeds: one cell for each, too.
        overrides: of single values, of its command.
        fid: column -> what was published.
        source: where it was published.

    Raises:
        ValueError: for a published number without a source, or a source without a number.
    """

    label: str
    choices: Mapping[str, str]
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sampler_seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    fid: Mapping[str, float] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        if bool(self.fid) != (self.source is not None):
            raise ValueError(f"{self}: `fid` and `source` go together")

    def __str__(self) -> str:
        return f"{self.label} {self.bits}"

    def seeds_at(self, scale: str) -> tuple[int, ...]:
        """Return the seeds of training at a scale."""
        return self.seeds.get(scale, (0,))

    @property
    def bits(self) -> str:
        """Bits of weights and activations as they are printed, `4/8`."""
        option = self.choices.get("bits")
        if option is None:
            return FLOAT_BITS

        widths = re.fullmatch(r"w(\d+)a(\d+)", option)
        return f"{widths[1]}/{widths[2]}" if widths else option


@dataclass(frozen=True)
class Column:
    """A column of a table: a model, to which all of its lines are done.

    Args:
        scales: scale -> group -> option; a table has no such column at another scale. The float
            model takes the option of `model` alone.
        published: what the published numbers are measured on.
    """

    scales: Mapping[str, Mapping[str, str]]
    published: str


@dataclass(frozen=True)
class Manifest:
    """A file of `configs/table`.

    Args:
        name: of the file.
        title: above the table.
        columns: by name.
        float_model: the first line.
        lines: those below it.
        caption: what it shows and how to read it, for the footer.
        measured: measurement beside `runs` whose figures of each line are columns, as
            `bench/cost.json`.
        plot_weight_bits: also draw the distance over the activations' bits at this width of the
            weights.

    Raises:
        ValueError: if a line has a published number of a column that does not exist.
    """

    name: str
    title: str
    columns: Mapping[str, Column]
    float_model: Line
    lines: tuple[Line, ...]
    caption: str = ""
    measured: str | None = None
    plot_weight_bits: int | None = None

    def __post_init__(self) -> None:
        for line in self.lines:
            unknown = sorted(set(line.fid) - set(self.columns))
            if unknown:
                raise ValueError(f"{line}: `fid` names no column: {', '.join(unknown)}")

    @property
    def scales(self) -> list[str]:
        """All scales that some column has."""
        return list(
            dict.fromkeys(scale for column in self.columns.values() for scale in column.scales)
        )

    def at(self, scale: str) -> list[str]:
        """Return the columns that there are at a scale."""
        return [name for name, column in self.columns.items() if scale in column.scales]

    def choices(self, scale: str, column: str, line: Line) -> dict[str, str]:
        """Return group -> option of one cell; where line and column both choose, the line wins."""
        of_column = self.columns[column].scales[scale]
        if line is self.float_model:
            of_column = {"model": of_column["model"]}
        return {**of_column, **line.choices}


def read_manifest(name: str) -> Manifest:
    """Return the manifest `configs/table/<name>.yaml`.

    Raises:
        ValueError: if there is none, if it has wrong keys, or a published number without a source.
    """
    folder = assets.configs() / "table"
    path = folder / f"{name}.yaml"
    if not path.exists():
        tables = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{name}: no such table (there are: {tables})")

    # Texts become the dataclasses that check them.
    content: Any = assets.read_yaml(path)
    try:
        shared = content.pop("choices", {})
        content |= {
            "columns": {key: _column(column) for key, column in content["columns"].items()},
            "float_model": line_of(content["float_model"]),
            "lines": tuple(line_of({**shared, **line}) for line in content["lines"]),
        }

        return Manifest(name=name, **content)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def line_of(content: Mapping[str, Any]) -> Line:
    """Return a line from its keys in a file.

    Raises:
        ValueError: for a key that is neither a line's nor a group.
    """
    choices = {key: option for key, option in content.items() if key not in NOT_CHOICES}
    _require_groups(choices)

    rest: dict[str, Any] = {key: value for key, value in content.items() if key in NOT_CHOICES}
    for key in ("sampler_seeds", "overrides"):
        if key in rest:
            rest[key] = tuple(rest[key])
    if "seeds" in rest:
        rest["seeds"] = {scale: tuple(seeds) for scale, seeds in rest["seeds"].items()}
    return Line(choices=choices, **rest)


def _column(content: Mapping[str, Any]) -> Column:
    for scale, choices in content["scales"].items():
        _require_groups(choices)
        if "model" not in choices:
            raise ValueError(f"scale {scale} of a column names no model")
    return Column(**content)


def _require_groups(choices: Mapping[str, Any]) -> None:
    """Refuse a choice of something that is not a group of `configs`."""
    for group in choices:
        if not _is_group(assets.configs() / group):
            raise ValueError(
                f"{group}: is neither a key of a line ({', '.join(NOT_CHOICES)}) nor a group"
            )


def _is_group(folder: Path) -> bool:
    return folder.is_dir() and folder.name not in ("table", "figure", "experiment")
