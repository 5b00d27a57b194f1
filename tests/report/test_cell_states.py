"""The state of a cell is told by the files of its run."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tdq_exp.commands import status
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
        "fingerprints": {"fit": "abc"}, "features": {"name": "digits"}, "seconds": seconds, "weights": cell.contents["weights"],
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
    assert state(cell) == ("half done", "fit done, its network is gone: to be fitted again")
    put(cell.folder / "baked.safetensors", {})
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


def test_a_set_of_several_checkpoints_is_as_far_as_all_of_them_are(cell):
    config = json.loads(json.dumps(cell.config))
    config["fit"]["report"] = "best_of_5"
    several = dataclasses.replace(cell, config=config)
    put(cell.folder / "fit.json", fit(done=True))
    for update, groups in ((100, [1, 1]), (200, [1, 0])):
        put(
            cell.folder / cell.sample / f"update{update}" / "images" / "groups.npy",
            np.array(groups),
        )
    assert state(several) == ("half done", "1500 of 5000 images of 5 checkpoints")


def test_a_damaged_map_of_groups_is_one_line(cell):
    groups = cell.folder / cell.sample / "images" / "groups.npy"
    groups.parent.mkdir(parents=True)
    groups.write_bytes(b"no array")
    with pytest.raises(ValueError, match="groups.npy: damaged"):
        state(cell)


@pytest.fixture
def done(asked):
    """An LSQ row of 100 s of fit, and 0.5 and 0.25 s an image; 50 steps."""
    lsq = asked[1]
    return cell_states.CellState(
        dataclasses.replace(lsq, run="other", row=row(lsq)), cell_states.DONE
    )


def missing(cell, **changes):
    """A cell of which there is nothing, with changes of its config."""
    config = json.loads(json.dumps(cell.config))
    for key, value in changes.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    return cell_states.CellState(dataclasses.replace(cell, config=config), cell_states.MISSING)


def left(*states):
    return list(cell_states.seconds_left(states).values())


def test_the_time_left_is_that_of_what_a_cell_still_does(done, cell):
    whole = missing(cell)
    assert left(done, whole) == [850.0]
    assert left(whole) == [None], "there is nothing to go by"

    half = dataclasses.replace(whole, state=cell_states.HALF, fit_done=True, sampled=0.4)
    assert left(done, half) == [100 + 0.6 * 500 + 250], "a network that is gone is fitted again"
    put(cell.folder / "baked.safetensors", {})
    assert left(done, half) == [0.6 * 500 + 250]

    # Of several sets of one fit, the others wait for the first.
    others = [missing(dataclasses.replace(cell, sample=name)) for name in "ab"]
    assert left(done, whole, *others) == [850.0, 750.0, 750.0]


def test_a_float_model_fits_nothing(asked, done):
    float_cell = asked[0]
    assert left(done, missing(float_cell)) == [750.0]

    # Its own rows come first, and say nothing of a quantized network that has rows of its own.
    quick = row(float_cell, seconds={"fit": 0.0, "sample": 100.0, "measure": 50.0})
    own = cell_states.CellState(
        dataclasses.replace(float_cell, run="own", row=quick), cell_states.DONE
    )
    assert left(done, own, missing(float_cell)) == pytest.approx([150.0])
    assert left(done, own, missing(asked[1])) == [850.0]
    assert left(own, missing(asked[1])) == [None], "no row tells how long its fit takes"


def test_a_fit_is_as_long_as_its_updates_and_a_set_as_its_steps_and_candidates(done, cell):
    updates, steps = cell.config["fit"]["updates"], cell.config["sampler"]["steps"]
    assert left(done, missing(cell, fit__updates=3 * updates)) == [300 + 750.0]
    assert left(done, missing(cell, sampler__steps=2 * steps)) == [100 + 1000 + 250.0]
    assert left(done, missing(cell, sampler__images=200)) == [100 + 150.0]
    assert left(done, missing(cell, fit__report="best_of_5")) == [100 + 5 * 750.0]
    assert left(done, missing(cell, fit__kind="ptq")) == [None], "a fit of another kind"
    assert left(done, missing(cell, model__label="other")) == [None]

    # A row of another number of steps counts for what it took, whatever its cell asks for.
    config = {**done.cell.row["config"], "sampler": {"steps": 2 * steps}}
    twice = dataclasses.replace(done.cell, row={**done.cell.row, "config": config})
    assert left(dataclasses.replace(done, cell=twice), missing(cell)) == [100 + 250 + 250.0]


def test_fits_of_several_rows_count_once(done, cell):
    """Two sets of a slow fit and one of a quick one: the median of two fits."""

    def with_fit(fingerprint, seconds):
        changes = {"fingerprints": {"fit": fingerprint}}
        changed = row(done.cell, **changes, seconds={**done.cell.row["seconds"], "fit": seconds})
        return dataclasses.replace(done, cell=dataclasses.replace(done.cell, row=changed))

    rows = [with_fit("slow", 900.0), with_fit("slow", 900.0), with_fit("quick", 100.0)]
    assert left(*rows, missing(cell)) == [500 + 750.0]


def test_the_state_of_everything_counts_the_runs_of_figures_and_their_numbers(tmp_path, capsys):
    runs = {
        label: {"run": f"digits_w4a4_{name}"}
        for label, name in (("LSQ W4A4", "lsq_release"), ("LSQ + TDQ W4A4", "of_before"))
    }
    column = {"missing": ["NIPQ W4A4"], "runs": {"float": {"run": "digits_fp"}, **runs}}
    numbers = {"columns": {"ddim": column}}
    put(tmp_path / "numbers" / "grids-digits.json", numbers)
    status.show([], "digits", tmp_path)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]

    # Rows, five lines at four numbers of steps; and networks, of which one has no number.
    assert ["figure8", "20", *"00000", "20"] in lines
    (grids,) = [line for line in lines if line[:1] == ["grids"]]
    missing = "ddim: PACT W4A4; ddim: NIPQ W4A4; ddim: LSQ + TDQ W4A4"  # unmeasured, and another's
    assert " ".join(grids) == f"grids 2 of 5 {missing}"
    assert any(line[:5] == ["layers", "0", "of", "3", "all:"] for line in lines)

    status.show(["table3"], "digits", tmp_path)
    assert "figure" not in capsys.readouterr().out
