"""Manifests of figures: which lines of which table a figure is about, and how it is measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdq_exp.config import assets
from tdq_exp.report import manifest as manifests
from tdq_exp.report.cells import Cell, cells_of
from tdq_exp.report.manifest import Manifest

FROM_ROWS = ("steps", "length")
KINDS = ("activations", "errors", "ranges", "layers", "grids", *FROM_ROWS)


@dataclass(frozen=True)
class FigureManifest:
    """A file of `configs/figure`.

    Args:
        name: of the file.
        title: above the figure.
        kind: what is measured and how it is drawn, one of `KINDS`.
        table: the manifest whose columns and lines are taken.
        methods: labels of the lines, `LSQ + TDQ`; none for the float model alone.
        bits: of the lines, `4/4`.
        images: that a measurement takes.
        steps: time steps that it looks at.
        sampling_steps: of the cells of a figure over steps.
        updates: scale -> numbers of updates beside the protocol's, of a figure over the length of
            training. Such a fit has the label `u<number>`.
        columns: of the table; all if there are none.

    Raises:
        ValueError: for an unknown kind.
    """

    name: str
    title: str
    kind: str
    table: str
    methods: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()
    images: int = 0
    steps: int = 0
    sampling_steps: tuple[int, ...] = ()
    updates: Mapping[str, Sequence[int]] = field(default_factory=dict)
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind}: choose one of {', '.join(KINDS)}")

    @property
    def is_from_rows(self) -> bool:
        """Whether rows are all that the figure is drawn from."""
        return self.kind in FROM_ROWS

    def lines_of(self) -> Manifest:
        """Return the table with only what the figure is about, each line at its first seed.

        Raises:
            ValueError: if a method or a pair of widths chooses no line.
        """
        table = manifests.read_manifest(self.table)
        lines = [
            dataclasses.replace(line, seeds={}, fid={}, source=None)
            for line in table.lines
            if line.label in self.methods and line.bits in self.bits
        ]

        chosen = {line.label for line in lines} | {line.bits for line in lines}
        unknown = [name for name in (*self.methods, *self.bits) if name not in chosen]
        if unknown:
            raise ValueError(f"{self.name}: {', '.join(unknown)}: no line of {self.table}")

        columns = {
            name: column
            for name, column in table.columns.items()
            if not self.columns or name in self.columns
        }
        float_model = dataclasses.replace(
            table.float_model, sampler_seeds=(0,), fid={}, source=None
        )
        return dataclasses.replace(
            table, lines=tuple(lines), float_model=float_model, columns=columns
        )


def names() -> list[str]:
    """Return the figures that there are."""
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def read_figure(name: str) -> FigureManifest:
    """Return the manifest `configs/figure/<name>.yaml`; `3` is `figure3`.

    Raises:
        ValueError: if there is none, or if it has wrong keys.
    """
    name = f"figure{name}" if re.fullmatch(r"\d+", name) else name
    path = _folder() / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"{name}: no such figure (there are: {', '.join(names())})")

    content = assets.read_yaml(path)
    try:
        lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
        return FigureManifest(name=name, **{**content, **lists})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def cells_of_figure(
    figure: FigureManifest, scale: str, out: Path, overrides: Sequence[str] = ()
) -> list[Cell]:
    """Return the cells that a figure is about, without their rows.

    Args:
        figure: the manifest.
        scale: of the table.
        out: folder of results.
        overrides: of every cell's command.

    Raises:
        ValueError: for an override of the sampling steps that the figure goes over; and as
            `cells_of`.
    """
    for override in overrides if figure.sampling_steps else ():
        if override.startswith("sampler.steps="):
            raise ValueError(f"{override}: {figure.name} names its numbers of sampling steps")

    table = figure.lines_of()
    longer = [
        dataclasses.replace(line, overrides=(*line.overrides, f"fit.updates={n}", f"label=u{n}"))
        for n in figure.updates.get(scale, ())
        for line in table.lines
    ]
    table = dataclasses.replace(table, lines=(*table.lines, *longer))
    if not figure.sampling_steps:
        return cells_of(table, scale, out, overrides)

    return [
        cell
        for steps in figure.sampling_steps
        for cell in cells_of(table, scale, out, [*overrides, f"sampler.steps={steps}"])
    ]


def _folder() -> Path:
    return assets.configs() / "figure"
