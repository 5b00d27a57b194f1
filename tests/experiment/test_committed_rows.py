"""Every committed row is found again: by its names, by its hashes, by the command that made it.

`committed_rows.json` lists, for each row, the fingerprint that it had before classes were named by
their package's face (null for a row that came later), the one that it has now, and the command. A
row may be added to it (`make freeze-rows`), never lost.
"""

import json
import os
import shlex
import shutil
from functools import lru_cache

import pytest

from tdq_exp.commands.verify import table_faults
from tdq_exp.config import records, schema
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, record_checks
from tdq_exp.experiment.finished_run import load
from tdq_exp.experiment.row import read_rows, write_rows
from tdq_exp.runtime import environment, tensor_files
from tdq_exp.runtime.files import fingerprint, sealed
from tests.experiment import committed
from tests.experiment.committed import ROOT, RUNS, fit_parts_of, record_of

LISTED = committed.listed()
FREEZE = "to list new rows: make freeze-rows"


def commands_of(run):
    """Yield (set, features, listed row, command) of every listed row of a run."""
    for name, rows in LISTED[run]["samples"].items():
        for features, row in rows.items():
            yield name, features, row, shlex.split(row["command"])


def shape_of(value):
    """Return keys, types and classes of a recorded configuration: all but its numbers."""
    if isinstance(value, dict):
        entries = sorted(value.items())
        return str([(key, v if key == "_target_" else shape_of(v)) for key, v in entries])
    return type(value).__name__


def _one_of_each_shape():
    """Return runs that have, between them, every shape of every group of the configuration."""
    chosen, seen = [], set()
    for run in LISTED:
        shapes = {(key, shape_of(value)) for key, value in record_of(run)["config"].items()}
        if not shapes <= seen:
            chosen.append(run)
            seen |= shapes
    return chosen


SHAPES = _one_of_each_shape()  # rebuilt as a whole, which takes longer than all other tests
HERE = [
    run
    for run in LISTED
    if (RUNS / run / "packed.safetensors").exists()
    or not record_of(run)["config"]["method"]["quantized"]
]


def test_every_committed_row_is_listed_and_no_other():
    rows = {
        (run, name, features)
        for run in committed.runs_with_a_row()
        for name, _, recorded in committed.sets_of(run)
        for features in recorded
    }
    listed = {(run, name, features) for run in LISTED for name, features, *_ in commands_of(run)}
    assert rows - listed == set(), FREEZE
    assert listed - rows == set(), "a listed row is gone"


@pytest.mark.parametrize("run", LISTED)
def test_each_row_has_its_listed_hashes(run):
    fit = record_of(run)
    assert fit["fingerprint"] == LISTED[run]["fit"][1] == fingerprint(fit["parts"])

    found = {name: (samples, rows) for name, samples, rows in committed.sets_of(run)}
    for name, features, listed, _ in commands_of(run):
        samples, rows = found[name]
        assert samples["fingerprint"] == fingerprint(samples["parts"])
        assert samples["parts"]["fit"] == fit["fingerprint"]

        row = rows[features]
        assert row["metrics"].get("fid") == listed["fid"]
        assert row["fingerprints"] == {
            "fit": fit["fingerprint"],
            "sample": listed["sample"][1],
            "measure": listed["measure"][1],
        }
        assert row["fingerprints"]["sample"] == samples["fingerprint"]


@pytest.mark.parametrize("run", LISTED)
def test_the_same_command_finds_every_row(run):
    record, found = record_of(run), {name: rows for name, _, rows in committed.sets_of(run)}
    for name, features, _, command in commands_of(run):
        row = found[name][features]
        made = committed.made_by(command, record, row)

        assert made.parts == record["parts"]
        assert (made.run, made.sample_name) == (run, name.partition("/")[0])
        assert made.fingerprints == row["fingerprints"]


@pytest.mark.parametrize("run", LISTED)
def test_a_recorded_configuration_states_its_own_parts(run):
    record = record_of(run)
    config = records.upgrade(record["config"])
    assert config["seed"] == record["parts"].get("seed", config["seed"])
    for group in record["parts"].keys() & {"fit", "bits", "weight", "act", "tdq", "plan", "habits"}:
        assert schema.parts_of(group, config[group]) == record["parts"][group]


@pytest.fixture(scope="module", autouse=True)
def _rebuilt_once():
    """A run's experiment is rebuilt once for its two tests: that takes longer than the rest of them."""
    rebuild = jobs.rebuild

    @lru_cache
    def by_content(content, file):
        return rebuild(json.loads(content), file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "rebuild", lambda config, file: by_content(json.dumps(config), file))
        yield


@pytest.mark.parametrize("run", SHAPES)
def test_a_recorded_configuration_rebuilds_to_its_own_parts(run):
    record = record_of(run)
    job = jobs.rebuild(record["config"], RUNS / run / "fit.json")
    assert job.name == record["name"]
    assert fit_parts_of(job, record) == record["parts"]


@pytest.mark.parametrize("name", ["digits_fp", "digits_w4a4_lsq_tdq", "digits_w8a5_ptq4dm_tdq"])
def test_the_same_command_does_nothing(name, tmp_path, monkeypatch):
    out = tmp_path / "results"
    shutil.copytree(RUNS / name, out / "runs" / name)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    listed = LISTED[f"{name}/seed0"]["samples"]["ddim50_n1000"]["digits"]
    overrides = shlex.split(listed["command"])
    job = jobs.build(compose([*overrides, f"out={out}", "tracker=none", "launcher=cpu"]))
    (row,) = pipeline.run(job)

    assert [row] == read_rows(RUNS / name / "seed0" / "ddim50_n1000" / "metrics.json")
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before


def test_every_committed_file_verifies():
    assert record_checks.faults_of(ROOT / "results") == []


@pytest.mark.parametrize("run", HERE)
def test_a_committed_run_loads(run):
    job, net = load(RUNS / run)
    assert f"{job.name}/seed{job.seed}" == run and not net.training


@pytest.mark.parametrize("run", [run for run in SHAPES if run not in HERE])
def test_a_committed_run_says_that_its_network_is_not_here(run):
    with pytest.raises(FileNotFoundError, match=r"baked\.safetensors: is not here"):
        load(RUNS / run)


def test_freezing_adds_new_rows_and_refuses_changed_ones(tmp_path, monkeypatch):
    run = "digits_w4a4_lsq_tdq/seed0"
    committed.data_sets()  # of all runs: kept for the other tests
    shutil.copytree(RUNS / run, tmp_path / "runs" / run)
    monkeypatch.setattr(committed, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(committed, "LIST", tmp_path / "list.json")
    monkeypatch.setattr(committed, "runs_with_a_row", lambda: (run,))

    # An empty list becomes the committed one, but for what a new row has no record of.
    (tmp_path / "list.json").write_text("{}")
    added = committed.freeze()
    assert len(added) == sum(1 for _ in commands_of(run))
    (listed,) = committed.listed().values()
    for name, features, row, _ in commands_of(run):
        old = {"measure": [None, row["measure"][1]], "sample": [None, row["sample"][1]]}
        assert listed["samples"][name][features] == row | old
    before = (tmp_path / "list.json").read_bytes()
    assert committed.freeze() == [] and (tmp_path / "list.json").read_bytes() == before

    # A row with another number is another row.
    file = tmp_path / "runs" / run / "ddim50_n1000" / "metrics.json"
    (row,) = read_rows(file)
    row["metrics"]["fid"] += 1
    write_rows(file, [sealed(row)])
    with pytest.raises(ValueError, match=r"ddim50_n1000: .* a listed row never changes"):
        committed.freeze()

    file.unlink()
    with pytest.raises(ValueError, match=r"ddim50_n1000: is listed, and its row of digits is gone"):
        committed.freeze()
    assert (tmp_path / "list.json").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("metrics", "fid"), 0.5, "damaged"),
        (("fingerprints", "fit"), "0" * 16, "a row is of the fit 0000000000000000"),
        (("images",), 10, "a row is of 10 images"),
        (("held_out", "isc_mean"), float("nan"), "a metric is not a number"),
        (("weights",), "0" * 16, "a row is of the weights 0000000000000000"),
        (("environment", "commit"), "0123456789ab", "names the commit 0123456789ab"),
    ],
)
def test_a_changed_row_is_a_fault_and_is_in_no_table(path, value, fault, tmp_path):
    run = "digits_w4a4_lsq_tdq/seed0"
    shutil.copytree(RUNS / run, tmp_path / run)
    file = tmp_path / run / "ddim50_n1000" / "metrics.json"
    (row,) = read_rows(file)
    *outer, last = path
    place = row
    for key in outer:
        place = place[key]
    place[last] = value

    # A number is changed in the file; what would belong to another row is sealed again.
    write_rows(file, [row if last == "fid" else sealed(row)])
    faults = record_checks.faults_of(tmp_path)
    if last == "commit" and environment.commit() is None:
        pytest.skip("outside of a checkout no commit is known")
    assert faults and any(fault in line for line in faults)
    assert last == "commit" or record_checks.row_faults(file)


def test_a_table_with_measured_costs_is_what_its_rows_give(monkeypatch):
    # Every run has its own test.
    monkeypatch.setattr(record_checks, "run_faults", lambda folder: [])
    faults, runs = table_faults("table7", RUNS.parent)
    assert not faults and runs


def test_the_verb_verify_says_what_is_wrong_and_ends_with_a_code(tmp_path, inside):
    run = tmp_path / "digits_w4a4_lsq_tdq" / "seed0"
    shutil.copytree(RUNS / "digits_w4a4_lsq_tdq" / "seed0", run)
    whole = inside(str(run), verb="verify")
    assert whole.returncode == 0 and "whole" in whole.stdout

    file = run / "ddim50_n1000" / "metrics.json"
    file.write_text(file.read_text().replace('"fid"', '"fie"'))
    found = inside(str(run), verb="verify")
    assert found.returncode == 1 and f"{file}: damaged" in found.stdout

    tensor_files.write_state(run / "state.earlier.pt", {"fingerprint": "0" * 16})
    assert any("is of the fit 0000000000000000" in fault for fault in record_checks.run_faults(run))

    os.mkfifo(run / "state.pt")  # nothing reads it in a finished run, and whoever did would wait
    found = inside(str(run), verb="verify")
    assert "state.pt: is a pipe" in found.stdout.replace("\n", " ")
    assert inside(str(tmp_path / "none"), verb="verify").returncode == 2
