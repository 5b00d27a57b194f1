"""Every committed row is found again: by its names, by its hashes, by the command that made it.

`committed_rows.json` lists, for each row, the fingerprint that it had before classes were named by
their package's face (null for a row that came later), and the one that it has now. A row may be
added to it, never lost.
"""

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdq_exp.commands.verify import table_faults
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import fit_stage, pipeline, verify
from tdq_exp.experiment.load import load
from tdq_exp.runtime import environment, tensor_files
from tdq_exp.runtime.files import fingerprint, read_json, sealed, write_json

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "results" / "runs"
LISTED = json.loads(Path(__file__).with_name("committed_rows.json").read_text())

# Made with numbers of their own, which no choice of a group says.
BY_HAND = {"ddim_small_w8a8_ptq4dm_mid_t/seed0", "ddim_small_w8a8_ptq4dm_balanced/seed0"}


def fit_of(run):
    return read_json(RUNS / run / "fit.json")


def parts_of(job, record):
    """The parts of a job's fit, on the data and the weights that a record names."""
    data = SimpleNamespace(parts=lambda: record["parts"].get("data"))
    data.train = SimpleNamespace(content=(record["parts"].get("data") or {}).get("train"))
    parts = fit_stage.fit_parts(job, data, record["parts"]["weights"])
    return json.loads(json.dumps(parts))


def choices(config):
    """The options of groups that a recorded configuration was composed of."""
    by_label = {"tdq": {"tdq": "temporal", "": "none"}, "plan": {"fattn": "float_attention"}}
    overrides = [f"model={config['model']['label']}", f"method={config['method']['label']}"]
    if not config["method"]["quantized"]:
        return overrides
    overrides += [f"bits={config['bits']['label']}"]
    for group in ("tdq", "plan"):
        label = config[group]["label"]
        option = by_label[group].get(label, label)
        overrides += [f"{group}={option}"] if option else []
    correction = config["fit"].get("correction", "none")
    return [*overrides, *([f"fit.correction={correction}"] if correction != "none" else [])]


@pytest.mark.parametrize("run", LISTED)
def test_no_row_is_lost_and_each_has_its_listed_hashes(run):
    fit = fit_of(run)
    assert fit["fingerprint"] == LISTED[run]["fit"][1] == fingerprint(fit["parts"])

    for name, rows in LISTED[run]["samples"].items():
        samples = read_json(RUNS / run / name / "samples.json")
        assert samples["fingerprint"] == fingerprint(samples["parts"])
        assert samples["parts"]["fit"] == fit["fingerprint"]

        recorded = {
            row["features"]["name"]: row
            for row in read_json(RUNS / run / name / "metrics.json")["rows"]
        }
        for features, listed in rows.items():
            row = recorded[features]
            assert row["metrics"].get("fid") == listed["fid"]
            assert row["fingerprints"] == {
                "fit": fit["fingerprint"],
                "sample": listed["sample"][1],
                "measure": listed["measure"][1],
            }
            assert row["fingerprints"]["sample"] == samples["fingerprint"]


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


@pytest.mark.parametrize("run", LISTED)
def test_a_recorded_configuration_rebuilds_to_its_own_parts(run):
    record = fit_of(run)
    job = jobs.rebuild(record["config"], RUNS / run / "fit.json")
    assert job.name == record["name"]
    assert parts_of(job, record) == record["parts"]


@pytest.mark.parametrize("run", [run for run in LISTED if run not in BY_HAND])
def test_the_same_command_finds_the_fit(run):
    record = fit_of(run)
    job = jobs.build(compose(choices(record["config"])), source=False)
    assert f"{job.name}/seed{job.seed}" == run
    assert parts_of(job, record) == record["parts"]


@pytest.mark.parametrize("name", ["digits_fp", "digits_w4a4_lsq_tdq", "digits_w8a5_ptq4dm_tdq"])
def test_the_same_command_does_nothing(name, tmp_path, monkeypatch):
    out = tmp_path / "results"
    shutil.copytree(RUNS / name, out / "runs" / name)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    overrides = choices(fit_of(f"{name}/seed0")["config"])
    job = jobs.build(compose([*overrides, f"out={out}", "tracker=none", "launcher=cpu"]))
    (row,) = pipeline.run(job)

    assert row == read_json(RUNS / name / "seed0" / "ddim50_n1000" / "metrics.json")["rows"][0]
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before


def test_every_committed_file_verifies():
    assert verify.faults_of(ROOT / "results") == []


@pytest.mark.parametrize("run", LISTED)
def test_a_committed_run_loads_or_says_that_its_network_is_not_here(run):
    folder = RUNS / run
    packed = (folder / "packed.safetensors").exists()
    if packed or not fit_of(run)["config"]["method"]["quantized"]:
        job, net = load(folder)
        assert f"{job.name}/seed{job.seed}" == run and not net.training
    else:
        with pytest.raises(FileNotFoundError, match=r"baked\.safetensors: is not here"):
            load(folder)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("metrics", "fid"), 0.5, "damaged"),
        (("fingerprints", "fit"), "0" * 16, "a row is of the fit 0000000000000000"),
        (("images",), 10, "a row is of 10 images"),
        (("weights",), "0" * 16, "a row is of the weights 0000000000000000"),
        (("environment", "commit"), "0123456789ab", "names the commit 0123456789ab"),
    ],
)
def test_a_changed_row_is_a_fault_and_is_in_no_table(path, value, fault, tmp_path):
    run = "digits_w4a4_lsq_tdq/seed0"
    shutil.copytree(RUNS / run, tmp_path / run)
    file = tmp_path / run / "ddim50_n1000" / "metrics.json"
    content = read_json(file)
    (row,) = content["rows"]
    *outer, last = path
    place = row
    for key in outer:
        place = place[key]
    place[last] = value

    # A number is changed in the file; what would belong to another row is sealed again.
    rows = [row if last == "fid" else sealed(row)]
    write_json(file, {"rows": rows})
    faults = verify.faults_of(tmp_path)
    if last == "commit" and environment.commit() is None:
        pytest.skip("outside of a checkout no commit is known")
    assert faults and any(fault in line for line in faults)
    assert last == "commit" or verify.row_faults(file)


def test_a_table_with_measured_costs_is_what_its_rows_give(monkeypatch):
    monkeypatch.setattr(verify, "run_faults", lambda folder: [])  # every run has its own test
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
    assert any("is of the fit 0000000000000000" in fault for fault in verify.run_faults(run))

    os.mkfifo(run / "state.pt")  # nothing reads it in a finished run, and whoever did would wait
    found = inside(str(run), verb="verify")
    assert "state.pt: is a pipe" in found.stdout.replace("\n", " ")
    assert inside(str(tmp_path / "none"), verb="verify").returncode == 2
