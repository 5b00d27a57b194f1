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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.data.arrays import open_array
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
    sampled = _sampled(cell.folder / cell.sample / "images" / "groups.npy")
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


def _sampled(groups: Path) -> float:
    """Return the share of a set's groups that are finished."""
    try:
        return float((open_array(groups) != 0).mean()) if groups.exists() else 0.0
    except ValueError as error:
        raise ValueError(f"{error}; remove its folder") from error


def _where(begun: bool, fit_done: bool, sampled: float, cell: Cell) -> str:
    """Return in which stage a cell stands."""
    images = cell.config["sampler"]["images"]
    if sampled == 1:
        return "sampled, not measured"
    if sampled:
        return f"{round(sampled * images)} of {images} images"
    if fit_done:
        return "fit done, not sampled"
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


def seconds_left(states: Sequence[CellState]) -> dict[str, float | None]:
    """Return cell -> the seconds that it still takes, from the measured seconds of other rows.

    A fit of which several sets are sampled is counted for the first of them.

    Rows of the same model and the same kind of fit are asked first, then rows of the model. None
    where there is nothing to go by.

    Args:
        states: of all cells, of any table.
    """
    rows = [(state.cell, state.cell.row) for state in states if state.cell.row]
    left: dict[str, float | None] = {}
    fits = set()

    for state in states:
        if state.finished:
            continue
        alike = [row for cell, row in rows if _kind(cell) == _kind(state.cell)]
        of_model = [row for cell, row in rows if _kind(cell)[0] == _kind(state.cell)[0]]
        fit_done = state.fit_done or state.cell.folder in fits
        left[state.cell.key] = _rest(state, alike or of_model, fit_done)
        fits.add(state.cell.folder)

    return left


def _kind(cell: Cell) -> tuple[Any, ...]:
    config = cell.config
    fit = config["fit"]
    return (config["model"]["label"], fit["kind"], fit.get("updates"), fit.get("reconstruct"))


def _rest(state: CellState, rows: Sequence[dict[str, Any]], fit_done: bool) -> float | None:
    """Return the seconds of what is left of a cell, at the median of some rows."""
    if not rows:
        return None

    def typical(stage: str) -> float:
        return median(row["seconds"][stage] / row["images"] ** (stage != "fit") for row in rows)

    images = state.cell.config["sampler"]["images"]
    fit = 0.0 if fit_done else typical("fit")
    return fit + images * ((1 - state.sampled) * typical("sample") + typical("measure"))
