"""The state of a cell is told by the files of its run."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tdq_exp.report import cell_states
from tdq_exp.report import cells as report_cells
from tdq_exp.report.manifest import read_manifest
from tdq_exp.runtime import files

NOW = 1e9


@pytest.fixture(scope="module")
def asked():
    manifest = read_manifest("table1")
    few = dataclasses.replace(manifest, lines=manifest.lines[1:2])
    float_cell, *_, lsq = report_cells.cells_of(few, "digits", Path("results"))
    return float_cell, lsq


@pytest.fixture
def cell(asked, tmp_path):
    return dataclasses.replace(asked[1], folder=tmp_path / "seed0")


def put(path, content, age=3600.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        files.write_json(path, content)
    os.utime(path, (NOW - age, NOW - age))


def fit(done):
    """A fit's record, as far as the state of a cell asks."""
    return {
        "name": "run", "fingerprint": files.fingerprint({}), "parts": {}, "config": {}, "done": done,
        "facts": {"weights": None},
    }  # fmt: skip


def state(cell):
    found = cell_states.state_of(report_cells.find(cell), NOW)
    return found.state, found.detail


def row(cell, **changes):
    config = json.loads(json.dumps(cell.config))
    seconds = {"fit": 100.0, "sample": 500.0, "measure": 250.0}
    return {
        "name": "run", "config": config, "images": 1000, "report": "last", "metrics": {"fid": 1.0},
        "fingerprints": {"fit": "abc"}, "features": {"name": "digits"}, "seconds": seconds, "weights": cell.nets["weights"],
        **changes,
    }  # fmt: skip


def test_every_state_of_a_run_from_nothing_to_its_row(cell):
    assert state(cell) == ("missing", "")

    put(cell.folder / "fit.json", fit(done=False))
    assert state(cell) == ("half done", "fit begun")
    put(cell.folder / "state.pt", {}, age=1)
    assert state(cell) == ("half done", "fit begun"), "whoever wrote it holds no lock any more"
    put(cell.folder / ".lock", {}, age=10)
    assert state(cell) == ("running", "fit begun")
    put(cell.folder / ".lock", {}, age=200)
    assert state(cell) == ("half done", "fit begun"), "its holder is dead"
    (cell.folder / ".lock").unlink()
    put(cell.folder / "failed.json", {"error": "OSError: full", "when": "today"}, age=10)
    assert state(cell) == ("failed", "OSError: full (today); fit begun")
    put(cell.folder / ".lock", {}, age=10)
    assert state(cell) == ("running", "fit begun")

    for name in (".lock", "failed.json", "state.pt"):
        (cell.folder / name).unlink()
    put(cell.folder / "fit.json", fit(done=True))
    assert state(cell) == ("half done", "fit done, not sampled")

    groups = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], np.uint8)
    put(cell.folder / cell.sample / "images" / "groups.npy", groups)
    assert state(cell) == ("half done", "300 of 1000 images")
    put(cell.folder / ".lock", {}, age=10)
    assert state(cell) == ("running", "300 of 1000 images")
    other = dataclasses.replace(cell, sample="ddim10_n1000")
    assert state(other) == ("half done", "fit done, not sampled"), "another set is being sampled"
    (cell.folder / ".lock").unlink()

    metrics = cell.folder / cell.sample / "metrics.json"
    (cell.folder / "fit.json").unlink()
    put(metrics, {"rows": [files.sealed(row(cell))]})
    assert state(cell) == ("done", "")
    old = row(cell)
    old["config"]["fit"]["lr"] = 1.0
    put(metrics, {"rows": [files.sealed(old)]})
    assert state(cell) == ("stale", f"fit.lr: 1.0 -> {cell.config['fit']['lr']}")


def test_a_damaged_map_of_groups_is_one_line(cell):
    groups = cell.folder / cell.sample / "images" / "groups.npy"
    groups.parent.mkdir(parents=True)
    groups.write_bytes(b"no array")
    with pytest.raises(ValueError, match="groups.npy: damaged"):
        state(cell)


def test_the_time_left_follows_the_rows_of_the_same_kind(asked, cell, tmp_path):
    float_cell, lsq = asked
    other = dataclasses.replace(lsq, run="other", row=row(lsq))
    done = cell_states.CellState(other, cell_states.DONE)
    half = cell_states.CellState(cell, cell_states.HALF, fit_done=True, sampled=0.4)
    whole = cell_states.CellState(cell, cell_states.MISSING)

    assert cell_states.seconds_left([done, whole]) == {cell.key: 850.0}
    assert cell_states.seconds_left([done, half]) == {cell.key: 0.6 * 500 + 250}
    assert cell_states.seconds_left([whole]) == {cell.key: None}

    # Of two sets of one fit, the second waits for the first.
    second = cell_states.CellState(dataclasses.replace(cell, sample="s"), cell_states.MISSING)
    left = cell_states.seconds_left([done, whole, second])
    assert list(left.values()) == [850.0, 750.0]

    # A float model has no rows of its own kind here: those of the model stand in.
    waiting = cell_states.CellState(float_cell, cell_states.MISSING)
    assert cell_states.seconds_left([done, waiting])[float_cell.key] == 850.0
