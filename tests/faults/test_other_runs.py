"""Every file that says whose it is, in the folder of another run: `verify` names it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tdq_exp.commands.pack import pack
from tdq_exp.config.compose import compose
from tdq_exp.data.arrays import ImageStore
from tdq_exp.deploy.onnx import graph
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, record_checks, stored_network
from tdq_exp.runtime import figures, files, tensor_files
from tdq_exp.runtime.tracking import Tracker

OTHER = "0" * 16
INTEGERS = ["sampler.engine=integer", "sampler.min_speedup=0"]


def build(out, weights):
    choices = ["model=tiny", "tracker=none", "launcher=cpu", "protocol.qat.calibration_samples=64"]
    return jobs.build(compose([*choices, *INTEGERS, f"out={out}", f"model.weights={weights}"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_weights):
    """A finished run with every kind of file beside it."""
    from tdq_exp.quant import calibrate

    kept, calibrate.KEPT = calibrate.KEPT, 512
    job = build(tmp_path_factory.mktemp("whole"), tiny_weights)
    (row,) = pipeline.run(job)
    calibrate.KEPT = kept

    fit, sample = row["fingerprints"]["fit"], row["fingerprints"]["sample"]
    pack(job.folder)
    choice = job.folder / job.sample_name / "engine.json"
    if not choice.exists():  # a machine without integers
        files.write_json(choice, {"layers": [], "of": 1, "sample": sample})

    about = {"id": "x", "name": f"{job.name}/seed0", "step": 1}
    files.write_json(job.folder / "wandb-id.json", about)
    tensors = tensor_files.read_tensors(job.folder / "baked.safetensors").tensors
    about = {"fit": fit, "update": "4"}
    tensor_files.write_tensors(job.folder / "best-0000004.safetensors", tensors, about)
    (job.folder / "net.onnx").write_bytes(graph.signed(b"a graph"))

    # Weights that were exported, with their history.
    tensor_files.write_tensors(job.folder / "x.safetensors", tensors, {"fit": fit})
    files.write_json(job.folder / "x.history.json", {"net": "x", "fingerprint": fit})
    return job.folder.parents[2]


@pytest.fixture
def job(whole, tmp_path, tiny_weights):
    """The run, in a folder where it may be spoilt."""
    shutil.copytree(whole, tmp_path / "out")
    return build(tmp_path / "out", tiny_weights)


def stated(key):
    """Return what writes another owner into a JSON file, as another run would."""

    def change(file):
        files.write_json(file, files.read_json(file) | {key: OTHER})

    return change


def signed(file):
    figures.sign(file, OTHER)


def of_another_fit(file):
    found = tensor_files.read_tensors(file)
    tensor_files.write_tensors(file, found.tensors, found.metadata | {"fit": OTHER})


def of_another_update(file):
    found = tensor_files.read_tensors(file)
    tensor_files.write_tensors(file, found.tensors, found.metadata | {"update": "2"})


def a_state_of_another_fit(file):
    state = tensor_files.read_state(file)
    tensor_files.write_state(file, state | {"fingerprint": OTHER})


def images_of_another_set(file):
    pixels = np.load(file)
    groups = len(np.load(file.with_name("groups.npy")))
    each = -(-len(pixels) // groups)
    store = ImageStore(file.parent, len(pixels), each, pixels.shape[1:], of=OTHER)
    for group in range(groups):
        store.put(group, pixels[each * group : each * group + each])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


SET = "ddim3_n12_integer0"
CASES = [
    ("layers.json", stated("fit")),
    ("wandb-id.json", stated("name")),
    ("x.history.json", stated("fingerprint")),
    ("intervals.png", signed),
    ("intervals.svg", signed),
    ("packed.safetensors", of_another_fit),
    ("baked.safetensors", of_another_fit),
    ("best-0000004.safetensors", of_another_fit),
    ("best-0000004.safetensors", of_another_update),
    ("state.pt", a_state_of_another_fit),
    ("net.onnx", flipped),
    (f"{SET}/engine.json", stated("sample")),
    (f"{SET}/grid.png", signed),
    (f"{SET}/images/images.npy", images_of_another_set),
]


def test_the_run_that_is_spoilt_below_is_whole(job):
    assert record_checks.faults_of(job.folder) == []
    before = {f: f.read_bytes() for f in job.folder.rglob("*") if f.is_file()}
    pipeline.run(job)
    assert before == {f: f.read_bytes() for f in job.folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("name", "change"), CASES, ids=[f"{name} {c.__name__}" for name, c in CASES]
)
def test_a_file_of_another_run_is_named(name, change, job, capsys):
    file = job.folder / name
    change(file)
    faults = record_checks.faults_of(job.folder)
    place = file.parent if file.parent.name == "images" else file
    assert [fault for fault in faults if str(place) in fault], faults

    # The command itself makes it again, or refuses, or does not read it; the row stays.
    row = files.read_json(job.folder / SET / "metrics.json")
    try:
        pipeline.run(job)
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    assert files.read_json(job.folder / SET / "metrics.json") == row


def test_a_row_of_another_engine_than_its_set_is_named(job):
    stated("engine")(job.folder / SET / "samples.json")
    (fault,) = record_checks.faults_of(job.folder)
    assert "metrics.json: a row is of the engine" in fault and f"its set of {OTHER}" in fault


def test_a_set_in_the_folder_of_another_is_named(job):
    (job.folder / SET).rename(job.folder / "ddim9_n12")
    (fault,) = record_checks.faults_of(job.folder)
    assert f"a row is of the set {SET}, in another one's folder" in fault


def test_images_that_were_begun_with_another_choice_of_layers_are_not_gone_on_with(job):
    folder = job.folder / SET
    groups = np.load(folder / "images" / "groups.npy", mmap_mode="r+")
    if files.read_json(folder / "engine.json")["layers"] == []:
        pytest.skip("this machine has no integers")
    groups[1] = 0
    groups.flush()
    (folder / "metrics.json").unlink()
    (folder / "engine.json").unlink()
    with pytest.raises(ValueError, match=r"engine\.json: is missing, but there are images"):
        pipeline.run(job)


def test_a_checkpoint_of_another_update_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds the network of update 2; put"):
        stored_network.require_update(tmp_path / "best-0000004.safetensors", {"update": "2"})


def test_curves_of_another_run_are_not_gone_on_with(tmp_path, capsys):
    files.write_json(tmp_path / "wandb-id.json", {"id": "x", "name": "other/seed0", "step": 1})
    tracker = Tracker("offline", "p", "mine/seed0", tmp_path, {})
    tracker.log({"loss": 1.0}, 0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "is of other/seed0; remove it" in printed
    assert files.read_json(tmp_path / "wandb-id.json")["id"] == "x"
    tracker.close()
