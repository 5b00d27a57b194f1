"""A stranger's files execute nothing, hang nowhere, and are answered with one line."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import tdq_exp
from tdq_exp.commands import export, sample
from tdq_exp.config.compose import compose
from tdq_exp.deploy import packed
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, record_checks
from tdq_exp.experiment.row import read_rows
from tdq_exp.fit.checkpoint import whole_state
from tdq_exp.fit.options import BAKED
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.quant.convert import bake
from tdq_exp.quant.kernels import cpu
from tdq_exp.runtime import files
from tests.faults.hostile import NO_STATES, PACKED, RUNS, STATES

SECONDS = 30  # whatever takes longer hangs


@pytest.fixture(autouse=True)
def _no_hanging():
    def stop(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a quantized run that nobody trained, and its packed network."""
    folder = tmp_path_factory.mktemp("whole")
    choices = ["model=tiny", "tdq=none", "launcher=cpu", f"out={folder}", "model.weights=unused"]
    job = jobs.build(compose(choices))
    net = bake(job.fit.skeleton(job.model, job.recipe), inplace=True)

    run = folder / "run"
    save_weights(net, run / BAKED, {})
    record = {"name": job.name, "config": job.recorded(), "fingerprint": files.fingerprint({})}
    files.write_json(run / "fit.json", {**record, "done": True, "parts": {}, "facts": {}})
    packed.save(net.state_dict(), folder / "net.safetensors", job.recorded(), "0" * 16)
    return folder


def test_the_run_that_is_spoilt_below_is_whole(whole):
    assert not tdq_exp.load(whole / "run").training
    assert not tdq_exp.load(whole / "net.safetensors").training


def refused(run, path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        run(path)
    answer = str(error.value)
    assert "\n" not in answer
    return answer


def name(hostile) -> str:
    return hostile.name


@pytest.mark.parametrize("hostile", RUNS, ids=name)
def test_a_strangers_run_is_refused_in_one_line(hostile, whole, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(whole / "run", run)
    hostile.spoil(run, mark)

    answer = refused(tdq_exp.load, run)
    assert all(word in answer for word in hostile.words)
    assert not mark.exists()


@pytest.mark.parametrize("hostile", PACKED, ids=name)
def test_a_strangers_packed_network_is_refused_in_one_line(hostile, whole, tmp_path):
    file, mark = tmp_path / "net.safetensors", tmp_path / "executed"
    shutil.copyfile(whole / "net.safetensors", file)
    hostile.spoil(file, mark)

    answer = refused(tdq_exp.load, file)
    assert "net.safetensors" in answer
    assert all(word in answer for word in hostile.words)


def test_a_packed_network_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "net.safetensors")
    assert "a pipe" in refused(tdq_exp.load, tmp_path / "net.safetensors")


@pytest.mark.parametrize("verb", [sample, export], ids=["sample", "export"])
def test_the_commands_say_the_same_line(verb, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    RUNS[0].spoil(run, tmp_path / "executed")

    out = tmp_path / ("out.onnx" if verb is export else "out")
    assert verb.main([str(run), "--out", str(out)]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and "\n" not in printed
    assert not out.exists() and not (tmp_path / "executed").exists()


# The state of a training


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A training that was stopped after one update, and the choices that go on with it."""
    folder = tmp_path_factory.mktemp("begun")
    choices = ["model=tiny", "method=fp", "fit=pretrain", "debug=smoke", "fit.validate_every=1"]
    choices += ["tracker=none", "launcher=cpu", f"out={folder}", f"data.cache={folder / 'cache'}"]
    job = jobs.build(compose([*choices, "fit.stop_after=1"]))
    with pytest.raises(InterruptedError):
        pipeline.run(job)
    return jobs.build(compose(choices)), (job.folder / "state.pt").read_bytes()


def spoilt(begun, hostile, tmp_path):
    job, whole = begun
    file = job.folder / "state.pt"
    (job.folder / "state.earlier.pt").unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(whole)
    hostile.spoil(file, tmp_path / "executed")
    return job


@pytest.mark.parametrize("hostile", STATES, ids=name)
def test_a_strangers_training_state_is_refused_in_one_line(hostile, begun, tmp_path):
    job = spoilt(begun, hostile, tmp_path)
    answer = refused(pipeline.run, job)
    assert "state.pt" in answer and all(word in answer for word in hostile.words)


@pytest.mark.parametrize("hostile", NO_STATES, ids=name)
def test_what_is_no_training_state_is_not_executed(hostile, begun, tmp_path, capsys):
    job, whole = begun
    spoilt(begun, hostile, tmp_path)
    assert whole_state(job.folder / "state.pt") is None
    assert "state.pt" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "executed").exists()


# Rows and records, sealed by a stranger

ROW = {"config": {}, "features": {"name": "digits"}, "images": 8, "metrics": {"fid": 1.5}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", None),
        ("features", []),
        ("features", {"name": 7}),
        ("images", "8"),
        ("images", True),
        ("metrics", {"fid": "1"}),
        ("metrics", {"fid": [1]}),
        ("fingerprints", 7),
        ("environment", []),
        ("held_out", "x"),
        ("name", 7),
    ],
)
def test_a_row_with_values_of_other_kinds_is_one_line(key, value, tmp_path):
    file = tmp_path / "metrics.json"
    files.write_json(file, {"rows": [files.sealed(ROW)]})
    assert read_rows(file, must_be_sealed=True)

    files.write_json(file, {"rows": [files.sealed(ROW | {key: value})]})
    answer = refused(lambda path: read_rows(path, must_be_sealed=True), file)
    assert "metrics.json" in answer and key in answer


@pytest.mark.parametrize("key", ["config", "facts", "parts"])
@pytest.mark.parametrize("value", [7, [], "x"])
def test_a_record_with_values_of_other_kinds_is_one_line(key, value, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    record = files.read_json(run / "fit.json") | {key: value}
    files.write_json(run / "fit.json", record | {"fingerprint": files.fingerprint(record["parts"])})

    (fault,) = record_checks.run_faults(run)
    assert "fit.json" in fault and key in fault
    assert "fit.json" in refused(tdq_exp.load, run)


def test_nothing_is_called_whole_that_was_not_checked(tmp_path):
    for path in ("/dev/null", tmp_path / "images.npy"):
        Path(path).touch()
        assert "no checksum" in refused(record_checks.faults_of, Path(path))


# The folder of compiled kernels


def test_the_folder_of_kernels_is_closed_to_others(tmp_path):
    wanted = tmp_path / "kernels"
    wanted.mkdir(mode=0o777)
    wanted.chmod(0o777)
    tmp_path.chmod(0o700)
    assert cpu.private_folder(wanted) == wanted
    assert wanted.stat().st_mode & 0o777 == 0o700


def test_kernels_go_elsewhere_where_others_could_put_code_in_their_place(tmp_path):
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(open_to_all)

    for wanted in (open_to_all / "kernels", link):
        found = cpu.private_folder(wanted)
        assert found != wanted and found.stat().st_mode & 0o777 == 0o700


def test_a_library_that_others_can_write_is_not_loaded(tmp_path):
    library = tmp_path / "kernels.so"
    library.write_bytes(b"")
    library.chmod(0o666)
    with pytest.raises(PermissionError, match="not run"):
        cpu._require_own(library)
