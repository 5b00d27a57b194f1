"""A file of rows leaves to the fit's record what that says alike, and reading puts it back."""

from __future__ import annotations

import copy
import json

import pytest

from tdq_exp.experiment.row import AS_FIT, read_rows, write_row
from tdq_exp.runtime.files import read_json, sealed, write_json

CONFIG = {
    "bits": {"act": 4, "weight": 4},
    "eval": {"label": "digits", "batch": 8},
    "fit": {"lr": 1.0, "updates": 2000},
    "sampler": {"steps": 50},
    "seed": 0,
    "smoke": False,
}
ROW = {
    "config": CONFIG,
    "features": {"name": "digits"},
    "images": 8,
    "metrics": {"fid": 1.5},
}


@pytest.fixture
def file(tmp_path):
    """A file of rows below the record of its fit."""
    write_json(tmp_path / "fit.json", {"config": CONFIG})
    return tmp_path / "ddim50_n8" / "metrics.json"


def in_file(file):
    (row,) = json.loads(file.read_text())["rows"]
    return row


def test_a_row_is_read_as_it_was_written(file):
    write_row(file, ROW)
    assert read_rows(file, must_be_sealed=True) == [sealed(ROW)]

    written = in_file(file)
    assert written["config"] == {group: CONFIG[group] for group in ("eval", "sampler")}
    assert written[AS_FIT] == ["bits", "fit", "seed", "smoke"]
    assert written["seal"] == sealed(ROW)["seal"]


def test_rows_of_two_features_share_a_file(file):
    other = {**ROW, "features": {"name": "another"}, "config": {**CONFIG, "seed": 1}}
    write_row(file, ROW)
    write_row(file, other)
    assert read_rows(file, must_be_sealed=True) == [sealed(other), sealed(ROW)]


def test_a_row_without_the_record_of_a_fit_is_written_whole(tmp_path):
    file = tmp_path / "metrics.json"
    write_row(file, ROW)
    assert in_file(file) == read_rows(file)[0] == sealed(ROW)


@pytest.mark.parametrize("group, value", [("seed", False), ("seed", 0.0), ("smoke", 0)])
def test_equal_values_of_another_kind_are_not_left_out(file, group, value):
    """1, 1.0 and true are equal in Python, but other JSON, of another seal."""
    row = {**ROW, "config": {**CONFIG, group: value}}
    write_row(file, row)
    assert group in in_file(file)["config"]
    assert read_rows(file, must_be_sealed=True) == [sealed(row)]


def test_a_group_that_the_record_gains_later_is_none_of_the_row(file):
    write_row(file, ROW)
    write_json(file.parents[1] / "fit.json", {"config": {**CONFIG, "later": {"key": 1}}})
    assert read_rows(file, must_be_sealed=True) == [sealed(ROW)]


@pytest.mark.parametrize("group", ["bits", "fit", "seed", "smoke"])
def test_a_row_beside_another_fit_is_refused(file, group):
    write_row(file, ROW)
    write_json(file.parents[1] / "fit.json", {"config": {**CONFIG, group: "other"}})
    with pytest.raises(ValueError, match=r"metrics\.json: damaged \(its content does not match"):
        read_rows(file)


def test_sets_of_one_fit_stay_readable_if_its_record_is_written_for_another_set(file):
    write_row(file, ROW)
    write_json(file.parents[1] / "fit.json", {"config": {**CONFIG, "sampler": {"steps": 10}}})
    assert read_rows(file, must_be_sealed=True) == [sealed(ROW)]


def test_a_missing_record_is_named(file):
    write_row(file, ROW)
    (file.parents[1] / "fit.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json: .* fit\.json that is missing; put it"):
        read_rows(file)


def test_a_record_above_the_run_is_another_ones(tmp_path):
    file = tmp_path / "runs" / "name" / "seed0" / "ddim50_n8" / "metrics.json"
    write_json(tmp_path / "fit.json", {"config": CONFIG})
    write_row(file, ROW)
    assert AS_FIT not in in_file(file)


@pytest.mark.parametrize(
    "groups", [None, "bits", {"bits": 1}, [["bits"]], ["bits", "unknown"], [1]]
)
def test_what_no_run_writes_is_refused(file, groups):
    row = copy.deepcopy(ROW) | {AS_FIT: groups}
    file.parent.mkdir()
    write_json(file, {"rows": [sealed(row)]})
    with pytest.raises(ValueError, match=r"metrics\.json: damaged"):
        read_rows(file)


def test_a_damaged_record_is_named(file):
    write_row(file, ROW)
    (file.parents[1] / "fit.json").write_text(json.dumps({"config": []}))
    with pytest.raises(ValueError, match=r"fit\.json: damaged \(its config is \[\]\)"):
        read_rows(file)
    assert read_json(file) is not None
