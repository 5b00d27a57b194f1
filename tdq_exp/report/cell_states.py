"""How far a cell of a table is, told by the files of its run, and how long the rest takes.

| state     | told by                                                                     |
|-----------|-----------------------------------------------------------------------------|
| done      | its row                                                                     |
| stale     | its row, made with another configuration than the command has now           |
| running   | a lock file that its holder keeps fresh                                     |
| failed    | `failed.json`, and nobody works on it                                       |
| half done | a fit that was begun or is done, images that are there; and no row          |
| missing   | nothing of it                                                               |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tdq_exp.config.naming import FIT_RECORD, PACKED
from tdq_exp.data.arrays import open_array
from tdq_exp.fit.options import BAKED
from tdq_exp.fit.registry import options_class
from tdq_exp.report.cells import Cell
from tdq_exp.runtime import failures, files

DONE, STALE, RUNNING, FAILED = "done", "stale", "running", "failed"
HALF, MISSING = "half done", "missing"
STATES = (DONE, STALE, RUNNING, FAILED, HALF, MISSING)

LOCK, FRESH = ".lock", 180.0  # a lock's holder touches it every half minute


@dataclass(frozen=True)
class CellState:
    """The state of a cell.

    Args:
        cell: with its row, if there is one.
        state: one of `STATES`.
        detail: where it stands, or why it failed.
        fit_done: whether its fit is finished.
        sampled: share of its images that are there.
    """

    cell: Cell
    state: str
    detail: str = ""
    fit_done: bool = False
    sampled: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether a run would do nothing."""
        return self.state in (DONE, STALE)


def state_of(cell: Cell, now: float | None = None) -> CellState:
    """Return the state of a cell.

    Args:
        cell: with the row that was found.
        now: the time, in seconds since the epoch.

    Raises:
        ValueError: if a record of its run is damaged.
    """
    now = time.time() if now is None else now
    if cell.done:
        changes = "; ".join(cell.changes)
        return CellState(cell, STALE if changes else DONE, changes, True, 1.0)

    # How far it is.
    fit = files.read_json(cell.folder / FIT_RECORD)
    fit_done = bool(fit and fit.get("done"))
    sampled = _sampled(cell.folder / cell.sample, _candidates(cell.config))
    where = _where(fit is not None, fit_done, sampled, cell)
    if cell.short and cell.row is not None:
        where = f"a row of {cell.row['images']} images; {where}".rstrip("; ")

    # Whether somebody works on it. The folder of a fit is shared by its samplings.
    running = _is_running(cell, now, fit_done)
    failed = failures.failure(cell.folder)
    if running:
        return CellState(cell, RUNNING, where, fit_done, sampled)
    if failed is not None:
        return CellState(cell, FAILED, f"{failed}; {where}".rstrip("; "), fit_done, sampled)

    is_float = not cell.config["method"]["quantized"]
    begun = sampled > 0 or (fit is not None and not is_float)
    return CellState(cell, HALF if begun else MISSING, where, fit_done, sampled)


def _sampled(folder: Path, candidates: int) -> float:
    """Return the share of a set's groups that are finished.

    Args:
        folder: of the set.
        candidates: networks that are sampled, each in a folder `update*` if there are several.
    """
    sets = folder.glob("images/groups.npy" if candidates == 1 else "update*/images/groups.npy")
    try:
        return sum(float((open_array(groups) != 0).mean()) for groups in sets) / candidates
    except ValueError as error:
        raise ValueError(f"{error}; remove its folder") from error


def _where(begun: bool, fit_done: bool, sampled: float, cell: Cell) -> str:
    """Return in which stage a cell stands."""
    images = cell.config["sampler"]["images"]
    if sampled == 1:
        return "sampled, not measured"
    if sampled:
        several = _candidates(cell.config)
        every = images * several
        of_several = f" of {several} checkpoints" if several > 1 else ""
        return f"{round(sampled * every)} of {every} images{of_several}"
    if fit_done:
        here = _is_float(cell.config) or _network_is_here(cell)
        return (
            "fit done, not sampled" if here else "fit done, its network is gone: to be fitted again"
        )
    return "fit begun" if begun else ""


def _is_running(cell: Cell, now: float, fit_done: bool) -> bool:
    """Return whether somebody works on a cell, as far as files tell."""
    lock = _age(cell.folder / LOCK, now)
    if lock is None or lock >= FRESH:
        return False
    return not fit_done or _begun(cell.folder / cell.sample)


def _begun(folder: Path) -> bool:
    """Return whether a sampled set has any file."""
    return any(path.is_file() for path in (*folder.glob("*"), *folder.glob("images/*")))


def _age(path: Path, now: float) -> float | None:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return None


# --- Time left


Config = Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """What rows have measured: the medians of those that are most like a configuration.

    Args:
        rows: of any cells. Their own configurations count, which may not be their cells'.
    """

    rows: Sequence[Mapping[str, Any]]

    def fit(self, config: Config) -> float | None:
        """Return the seconds of a fit: of fits of its kind and, if possible, of its length.

        A fit takes as long as it has updates; one of another kind says nothing of it.
        """
        if options_class(config["fit"]["kind"]).loads_only:
            return 0.0

        length = _updates(config)
        alike = {
            row["fingerprints"]["fit"]: (_updates(row["config"]), row["seconds"]["fit"])
            for row in self.rows
            if _kind(row["config"]) == _kind(config)
        }
        as_long = [seconds for updates, seconds in alike.values() if updates == length]
        return _median(as_long or [length / n * seconds for n, seconds in alike.values() if n])

    def sample(self, config: Config) -> float | None:
        """Return the seconds of an image, which takes as long as it has steps."""
        return self._of_image("sample", config, _passes)

    def measure(self, config: Config) -> float | None:
        """Return the seconds that measuring takes for each image."""
        return self._of_image("measure", config, _candidates)

    def _of_image(self, stage: str, config: Config, units: Callable[[Config], int]) -> float | None:
        """Return the seconds of a stage for an image.

        Rows of the same model count, those of quantized or of float networks as the configuration
        is; else all of the model.

        Args:
            stage: of a row's seconds.
            config: of the image.
            units: how many equal parts an image has, in a configuration.
        """
        found: dict[bool, list[float]] = {True: [], False: []}
        for row in self.rows:
            other = row["config"]
            if _model(other) == _model(config):
                of_unit = row["seconds"][stage] / row["images"] / units(other)
                found[_is_float(other) == _is_float(config)].append(units(config) * of_unit)
        return _median(found[True] or found[False])


def seconds_left(states: Sequence[CellState]) -> dict[str, float | None]:
    """Return cell -> the seconds that it still takes, from the measured seconds of other rows.

    Each cell is priced by what its command would do: the fit, unless it is done and its network is
    there; the images that are missing; the measuring. A float model has no fit. A fit of which
    several sets are sampled is counted for the first of them. None where no row tells one of these.

    Args:
        states: of all cells, of any table.
    """
    rates = Rates([state.cell.row for state in states if state.cell.row])
    left: dict[str, float | None] = {}
    fits = set()

    for state in states:
        if state.finished:
            continue

        # Another set of a recorded fit needs its network, and fits it again if that is gone.
        cell, config = state.cell, state.cell.config
        fit_done = cell.folder in fits or (state.fit_done and _network_is_here(cell))
        fit = 0.0 if fit_done else rates.fit(config)
        fits.add(cell.folder)

        images = config["sampler"]["images"]
        sample, measure = rates.sample(config), rates.measure(config)
        if fit is None or sample is None or measure is None:
            left[cell.key] = None
        else:
            left[cell.key] = fit + images * ((1 - state.sampled) * sample + measure)

    return left


def _network_is_here(cell: Cell) -> bool:
    return any((cell.folder / name).exists() for name in (BAKED, PACKED))


def _is_float(config: Config) -> bool:
    return not config["method"]["quantized"]


def _model(config: Config) -> tuple[Any, ...]:
    return (config["model"]["label"], config["eval"]["label"])


def _kind(config: Config) -> tuple[Any, ...]:
    """Return what a fit's time depends on beside its length."""
    fit = config["fit"]
    kind = (fit["kind"], fit.get("batch_size"), fit.get("reconstruct"), fit.get("rounding"))
    return (config["model"]["label"], *kind)


def _updates(config: Config) -> int:
    return int(config["fit"].get("updates") or 0)


def _passes(config: Config) -> int:
    """Return how many forward passes an image takes."""
    return int(config["sampler"]["steps"]) * _candidates(config)


def _candidates(config: Config) -> int:
    """Return how many networks of a fit are sampled and measured."""
    fit = config["fit"]
    return options_class(fit["kind"]).checkpoints if fit.get("report") == "best_of_5" else 1


def _median(numbers: Sequence[float]) -> float | None:
    return median(numbers) if numbers else None
