"""The cells of a table: one run each, the command that makes it, and the row that was found.

A cell is missing if there is no row. Its row is *stale* if it was made with another configuration
or another float net than the command has now, and *short* if it has fewer images than the command
asks for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tdq_exp.config import naming, schema
from tdq_exp.config.compose import compose, state_of_files, value_of
from tdq_exp.experiment.record_checks import row_faults
from tdq_exp.experiment.row import read_rows
from tdq_exp.report.compared import compared, compared_of_fit
from tdq_exp.report.contents import NAMES, known_contents, of_row
from tdq_exp.report.manifest import Line, Manifest
from tdq_exp.runtime import stage

KEPT = 1024  # configurations: more than the cells of all tables and figures of a scale

# Overrides that a table sets itself, and what to do instead.
SET_BY_TABLE = {
    "out": "use --out",
    "go": "use --go",
    "experiment": "the table names its runs",
    "seed": "the table names its training seeds",
    "sampler.seed": "the table names its sampler seeds",
    "plan_only": "--run prints the plan before it starts",
    "calibration.path": "the table names its calibration sets; python -m tdq_exp.run takes another",
}

# Overrides that say where and how fast: groups, and last parts of a key.
MACHINE_GROUPS = {"launcher", "tracker", "hydra"}
MACHINE_KEYS = {"cache", "weights", "path", "export", "stop_after", "png"}


@dataclass(frozen=True)
class Place:
    """Where cells stand in a table: the name of a column, a line, and the scale."""

    column: str
    line: Line
    scale: str


@dataclass(frozen=True)
class Cell:
    """One run at one sampler seed.

    Args:
        column, line, scale: where it stands.
        run: name of the run.
        overrides: of the command that makes it.
        config: what these compose to, as plain values.
        folder: of the fit.
        sample: folder of the sampled set inside of that.
        images: how many the line asks for by itself, without a user's overrides.
        contents: row's key -> hash of what the command would take and does not make, networks and
            images; see `report.contents`.
        row: its row, or one of the same sampler with fewer images, or None.
    """

    column: str
    line: Line
    run: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    folder: Path
    sample: str
    images: int
    scale: str = "paper"
    contents: Mapping[str, str] = field(default_factory=dict)
    row: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The run's name, with the seeds that are not the first."""
        training, sampling = self.config["seed"], self.config["sampler"]["seed"]
        name = self.run + (f" seed={training}" if training else "")
        return name + (f" sampler.seed={sampling}" if sampling else "")

    @property
    def key(self) -> str:
        """The name, and that of the sampled set: two cells of one key are the same run."""
        return f"{self.name} {self.sample}"

    @property
    def done(self) -> bool:
        """Whether the row is the one that the command makes, not one of fewer images."""
        return self.row is not None and self.row["images"] == self.config["sampler"]["images"]

    @property
    def short(self) -> bool:
        """Whether the row has fewer images than the line asks for."""
        return self.row is not None and self.row["images"] < self.images

    @property
    def changes(self) -> list[str]:
        """What the configuration has become since the row was made; empty if nothing changed."""
        if self.row is None:
            return []

        row = self.row
        others = [
            f"{NAMES[name]}: {of_row(row, name)} -> {fingerprint}"
            for name, fingerprint in self.contents.items()
            if of_row(row, name) != fingerprint
        ]
        return others + stage.differences(compared(row["config"]), compared(self.config))


def cells_of(
    manifest: Manifest,
    scale: str,
    out: Path,
    overrides: Sequence[str] = (),
    column: str | None = None,
) -> list[Cell]:
    """Return the cells of a table, column by column, the float model's first, without their rows.

    Args:
        manifest: the table.
        scale: one of its scales.
        out: folder of results.
        overrides: of every cell's command, such as data.source.path=PATH.
        column: whose cells have them; all if None.

    Raises:
        ValueError: for a scale, a column or an override that does not exist, or an override of
            something that the table sets itself.
    """
    columns = manifest.at(scale)
    if not columns:
        raise ValueError(f"--scale {scale}: {manifest.name} has {', '.join(manifest.scales)}")
    if column is not None and column not in columns:
        raise ValueError(
            f"--column {column}: {manifest.name} at scale {scale} has {', '.join(columns)}"
        )

    for override in overrides:
        if _key(override) in SET_BY_TABLE:
            raise ValueError(f"{override}: {SET_BY_TABLE[_key(override)]}")
        if _key(override).startswith("bits."):
            raise ValueError(f"{override}: the table chooses bits for its lines")
    _require_undivided(manifest, scale, columns if column is None else [column], overrides)

    cells: list[Cell] = []
    for name in columns:
        given = overrides if column in (None, name) else ()
        for line in (manifest.float_model, *manifest.lines):
            # The float model is loaded as it is: numbers of a fit are for the quantized lines.
            is_float = line is manifest.float_model
            extra = [o for o in given if not (is_float and _key(o).startswith("fit."))]
            choices = manifest.choices(scale, name, line)
            seeds = list(product(line.seeds_at(scale), line.sampler_seeds))
            cells += cells_of_line(Place(name, line, scale), choices, seeds, out, extra)

    return cells


def _require_undivided(
    manifest: Manifest, scale: str, columns: Sequence[str], overrides: Sequence[str]
) -> None:
    """Refuse an override that would make one run of lines that differ in its value.

    Raises:
        ValueError: naming the override and a line that sets it.
    """
    lines = (manifest.float_model, *manifest.lines)
    for override in overrides:
        key = _key(override)
        setting = [line for line in lines if key in map(_key, line.overrides)]
        for column in columns if setting else ():
            commands = (
                (
                    *(f"{g}={o}" for g, o in manifest.choices(scale, column, line).items()),
                    *line.overrides,
                )
                for line in lines
            )
            values = [value_of(command, key) for command in commands]
            if any(value != values[0] for value in values):
                raise ValueError(f"{override}: the table chooses {key} for {setting[0]}")


def cells_of_line(
    place: Place,
    choices: Mapping[str, str],
    seeds: Sequence[tuple[int, int]],
    out: Path,
    extra: Sequence[str] = (),
) -> Iterator[Cell]:
    """Yield a cell for each pair of a training seed and a sampler's seed of a line.

    Args:
        place: where they stand.
        choices: group -> option, of the command.
        seeds: pairs.
        out: folder of results.
        extra: a user's overrides.

    Raises:
        ValueError: if an override is of something that the table chooses.
    """
    line = place.line
    for override in extra:
        if _key(override) in choices:
            raise ValueError(f"{override}: the table chooses {_key(override)} for {line}")

    tracker = [] if any(_key(override) == "tracker" for override in extra) else ["tracker=none"]
    own = [*(f"{group}={option}" for group, option in choices.items()), *line.overrides]

    for training, sampling in seeds:
        named = [f"seed={training}"] if training else []
        named += [f"sampler.seed={sampling}"] if sampling else []
        where = (f"out={_quoted(out)}", *tracker, *extra)
        job = _job(
            tuple(own), where, (training, sampling), bool(in_footer(extra)), state_of_files()
        )

        yield Cell(
            column=place.column,
            line=line,
            scale=place.scale,
            run=job.run,
            overrides=(*own, *named, *where),
            config=job.config,
            folder=job.folder,
            sample=job.sample,
            images=job.images,
            contents=known_contents(job.composed, map(_key, extra)),
        )


class Job(NamedTuple):
    """What the command of a cell composes to; fields as those of `Cell`."""

    composed: Any  # a DictConfig
    run: str
    config: dict[str, Any]
    folder: Path
    sample: str
    images: int


@lru_cache(KEPT)
def _job(
    own: tuple[str, ...],
    where: tuple[str, ...],
    seeds: tuple[int, int],
    changed: bool,
    files: object,
) -> Job:
    """Return what a command composes to; tables, figures and claims ask for the same ones.

    Args:
        own: overrides of the line.
        where: overrides that every line has.
        seeds: of training and sampling.
        changed: whether a user's overrides say something else than where and how fast.
        files: state of the files that are read.
    """
    cfg = compose((*own, *where))
    bare = compose(own) if changed else cfg

    # A seed changes nothing else.
    cfg.seed, cfg.sampler.seed = seeds

    name = naming.fit_name(cfg)
    return Job(
        composed=cfg,
        run=name,
        config=schema.plain(cfg),
        folder=naming.run_folder(cfg, name),
        sample=naming.sample_name(cfg),
        images=bare.sampler.images,
    )


def find(cell: Cell) -> Cell:
    """Return the cell with its row.

    That is the row that its command makes, else the largest that differs in the images alone.

    Raises:
        ValueError: if a file of rows is damaged.
    """
    exact = _rows(cell, cell.folder / cell.sample / "metrics.json")
    if exact:
        return dataclasses.replace(cell, row=exact[0])

    sampler = compared(cell.config)["sampler"]

    # Else the longest set of the same run that was sampled the same way.
    shorter = [
        row
        for path in sorted(cell.folder.glob("*/metrics.json"))
        for row in _rows(cell, path)
        if row["images"] < cell.config["sampler"]["images"]
        and compared(row["config"])["sampler"] == sampler
        and row["report"] == cell.config["fit"]["report"]
    ]

    return dataclasses.replace(cell, row=max(shorter, key=_images, default=None))


def in_footer(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that a table's footer names: not those that say where and how fast."""
    named = []
    for override in overrides:
        key = _key(override).split(".")
        if key[0] not in MACHINE_GROUPS and key[-1] not in MACHINE_KEYS:
            named.append(override)
    return named


def _rows(cell: Cell, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that were measured with the cell's features.

    Raises:
        ValueError: if a row does not verify.
    """
    if faults := row_faults(path):
        raise ValueError(faults[0])
    rows = read_rows(path, must_be_sealed=True)
    label = cell.config["eval"]["label"]
    return [row for row in rows if row["config"]["eval"]["label"] == label]


def _images(row: Mapping[str, Any]) -> int:
    return row["images"]


def fit_changes(cell: Cell, config: dict[str, Any]) -> list[str]:
    """Return in what the fit that a cell asks for differs from one of a recorded configuration."""
    return stage.differences(compared_of_fit(config), compared_of_fit(cell.config))


def _key(override: str) -> str:
    """Return what an override sets: `+a.b=1` -> `a.b`."""
    return override.lstrip("+~").split("=", 1)[0]


def _quoted(path: Path) -> str:
    """Return a path as the value of an override."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", r"\'") + "'"
