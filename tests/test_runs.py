"""Whole runs of a tiny model: twice is once, killed is never killed, two processes are one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tdq_exp
from tdq_exp.commands import sample
from tdq_exp.commands.pack import pack
from tdq_exp.config.compose import compose
from tdq_exp.data.arrays import ImageStore
from tdq_exp.diffusion.objective import noise_prediction_loss
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import (
    cost,
    measure_stage,
    pipeline,
    record_checks,
    sample_stage,
    stored_network,
)
from tdq_exp.experiment.finished_run import load
from tdq_exp.experiment.record_checks import row_faults
from tdq_exp.experiment.row import measure_parts, read_rows, write_rows
from tdq_exp.experiment.stored_network import read_fit
from tdq_exp.fit import Qat
from tdq_exp.fit.checkpoint import best_file
from tdq_exp.fit.loop import Interrupted
from tdq_exp.fit.qat import QatTraining
from tdq_exp.models import pixel
from tdq_exp.quant import calibrate
from tdq_exp.runtime import environment, files, signals
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["model=tiny", "tracker=none", "launcher=cpu", "protocol.qat.calibration_samples=64"]


def build(tmp_path, weights, *overrides):
    return jobs.build(compose([*QUICK, f"out={tmp_path}", f"model.weights={weights}", *overrides]))


@pytest.fixture(scope="module", autouse=True)
def _few_start_values(few_start_values_of_a_module):
    """All fits of this file are calibrated alike, so that they can be compared."""


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, tiny_weights):
    """Where the default run lies, finished."""
    out = tmp_path_factory.mktemp("default")
    pipeline.run(build(out, tiny_weights))
    return out


@pytest.fixture
def finished(default_run, tmp_path):
    """A copy of the default run in the test's own folder: there it is done already."""
    shutil.copytree(default_run, tmp_path, dirs_exist_ok=True)


def images(made):
    return np.load(made.folder / made.sample_name / "images" / "images.npy")


def test_a_row_is_not_replaced_by_one_of_another_measurement(tmp_path, tiny_weights, finished):
    file = tmp_path / "runs/tiny_w4a4_lsq_tdq/seed0/ddim3_n12/metrics.json"
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"eval\.reference_images: None -> 9.*sampler\.label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, "eval.reference_images=9"))
    with pytest.raises(ValueError, match=r"fit\.lr: .*label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, "fit.lr=1e-5"))
    assert file.read_bytes() == before
    assert not list(tmp_path.rglob("failed.json")), "the run that is there has not failed"

    both = build(tmp_path, tiny_weights, "eval.reference_images=9", "sampler.label=few")
    (row,) = pipeline.run(both)
    assert row["reference"]["images"] == 9 and file.read_bytes() == before


def test_images_that_are_sampled_again_take_nothing_over(tmp_path, tiny_weights, finished):
    made = build(tmp_path, tiny_weights)
    folder = made.folder / made.sample_name
    shutil.rmtree(folder / "images")
    (folder / "metrics.json").unlink()
    record = files.read_json(folder / "samples.json")
    elsewhere = [{"environment": {"commit": "another", "machine": "another"}}]
    files.write_json(folder / "samples.json", record | {"seconds": 1000.0, "made": elsewhere})

    (row,) = pipeline.run(made)
    assert row["seconds"]["sample"] < 1000 and "sampled_on" not in row


def test_a_fit_is_not_begun_beside_rows_that_could_not_be_read_then(
    tmp_path, tiny_weights, finished
):
    """A row leaves the groups of its configuration to the record of its fit."""
    made = build(tmp_path, tiny_weights)
    file = made.folder / made.sample_name / "metrics.json"
    before = file.read_bytes()
    for name in ("fit.json", "state.pt", "baked.safetensors"):
        (made.folder / name).unlink()

    copy = shutil.copy(tiny_weights, tmp_path / "copy.safetensors")
    with pytest.raises(
        ValueError, match=r"metrics\.json: its rows refer .* fit\.json.*put the file back"
    ):
        pipeline.run(build(tmp_path, copy))
    assert not (made.folder / "fit.json").exists() and file.read_bytes() == before

    pipeline.run(made)  # the same command makes the same record
    assert file.read_bytes() == before


@pytest.mark.parametrize("method", ["lsq", "pact", "nipq"])
@pytest.mark.parametrize("tdq", ["none", "temporal", "s10"])
def test_every_method_goes_from_float_net_to_row(tmp_path, tiny_weights, method, tdq):
    made = build(tmp_path, tiny_weights, f"method={method}", f"tdq={tdq}")
    (row,) = pipeline.run(made)
    assert row["name"] == made.name
    assert row["images"] == 12
    assert np.isfinite(list(row["metrics"].values())).all()
    assert row["features"]["name"] == "digits"
    assert row["held_out"]["images"] == 12
    assert len(row["environment"]["versions"]["torch"]) > 2
    for file in (
        "fit.json",
        "layers.json",
        "intervals.png",
        "baked.safetensors",
        f"{made.sample_name}/grid.png",
    ):
        assert (made.folder / file).stat().st_size > 0


def test_a_first_layer_that_cuts_the_starting_noise_is_recorded_and_said(
    tmp_path, tiny_weights, capsys, monkeypatch
):
    monkeypatch.setattr(calibrate, "KEPT", 32768)  # few values would not tell how wide 8 bits are
    made = build(tmp_path, tiny_weights, "bits=w4a4", "method=lsq", "tdq=none", "label=cuts")
    pipeline.run(made)
    found = json.loads((made.folder / "fit.json").read_text())["facts"]["first_layer"]
    low, high = found["range"]
    assert -4 < low < 0 < high < 4 and 1e-3 < found["noise_beyond"] < 0.5
    said = f"{found['noise_beyond']:.1%} of the starting noise is beyond"
    assert said in capsys.readouterr().out
    wide = build(
        tmp_path, tiny_weights, "bits=w4a4", "method=lsq", "tdq=none", "label=wide", "plan=edge8"
    )
    pipeline.run(wide)
    assert "of the starting noise is beyond" not in capsys.readouterr().out


def test_the_same_command_again_does_nothing(tmp_path, tiny_weights, finished, monkeypatch):
    made = build(tmp_path, tiny_weights)
    first = pipeline.run(made)
    before = {
        f: f.stat().st_mtime_ns
        for f in made.folder.rglob("*")
        if f.is_file() and f.name != "fit.json"
    }
    monkeypatch.setattr(Qat, "run", None)  # would be called if anything were trained again
    monkeypatch.setattr(measure_stage, "measure", None)
    second = pipeline.run(build(tmp_path, tiny_weights))
    assert second == first
    assert before == {
        f: f.stat().st_mtime_ns
        for f in made.folder.rglob("*")
        if f.is_file() and f.name != "fit.json"
    }


def test_a_killed_fit_ends_with_the_bits_of_one_that_was_not(tmp_path, tiny_weights):
    dropout = ["tdq.interval.dropout=0.2"]  # its random state has to survive, too
    whole = build(tmp_path / "whole", tiny_weights, *dropout)
    pipeline.run(whole)
    with pytest.raises(Interrupted):
        pipeline.run(build(tmp_path / "killed", tiny_weights, *dropout, "fit.stop_after=3"))
    killed = build(tmp_path / "killed", tiny_weights, *dropout)
    pipeline.run(killed)
    one, other = (load_file(made.folder / "baked.safetensors") for made in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert np.array_equal(images(whole), images(killed))


def test_a_signal_saves_where_no_validation_does_and_the_run_ends_with_the_same_bits(
    tmp_path, tiny_weights, default_run, monkeypatch
):
    def stop_at_third(training, update):
        if update == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return 0

    monkeypatch.setattr(QatTraining, "phase", stop_at_third)
    made = build(tmp_path, tiny_weights)
    with signals.handled(), pytest.raises(signals.Stopped, match="update 3 is saved"):
        pipeline.run(made)
    assert torch.load(made.folder / "state.pt", weights_only=True)["update"] == 3
    assert not (made.folder / ".lock").exists()
    monkeypatch.undo()

    # In the middle of sampling: what is finished stays.
    put = ImageStore.put

    def put_and_stop(store, group, pixels):
        put(store, group, pixels)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ImageStore, "put", put_and_stop)
    with signals.handled(), pytest.raises(signals.Stopped, match="SIGTERM"):
        pipeline.run(made)
    done = np.load(made.folder / made.sample_name / "images" / "groups.npy")
    assert (done != 0).tolist() == [True, False, False]
    monkeypatch.undo()

    pipeline.run(made)
    whole = build(default_run, tiny_weights)
    one, other = (load_file(run.folder / "baked.safetensors") for run in (whole, made))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert np.array_equal(images(whole), images(made))


def test_killed_sampling_goes_on_with_the_same_bits(tmp_path, tiny_weights, finished):
    made = build(tmp_path, tiny_weights)
    pipeline.run(made)
    before = images(made).copy()
    folder = made.folder / made.sample_name
    done = np.load(folder / "images" / "groups.npy", mmap_mode="r+")
    done[1] = 0
    array = np.load(folder / "images" / "images.npy", mmap_mode="r+")
    array[4:8] = 0
    array.flush(), done.flush()
    (folder / "metrics.json").unlink()
    pipeline.run(made)
    assert np.array_equal(images(made), before)


def test_a_training_keeps_its_micro_batches_and_its_compiler(tmp_path, tiny_weights, monkeypatch):
    class Blocks:
        active = True

        def __init__(self, net):
            """Compile nothing."""

        def try_out(self, run):
            run()

    monkeypatch.setattr("tdq_exp.fit.loop.CompiledBlocks", Blocks)
    options = ["launcher.micro_batches=2", "launcher.compile=true"]
    with pytest.raises(Interrupted):
        pipeline.run(build(tmp_path, tiny_weights, "fit.stop_after=2", *options))
    with pytest.raises(ValueError, match="begun with launcher.micro_batches=2, now 1"):
        pipeline.run(build(tmp_path, tiny_weights, options[1]))
    with pytest.raises(ValueError, match="begun with launcher.compile=true, now false"):
        pipeline.run(build(tmp_path, tiny_weights, options[0]))
    made = build(tmp_path, tiny_weights, *options)
    (row,) = pipeline.run(made)
    facts = files.read_json(made.folder / "fit.json")["facts"]
    assert facts["micro_batches"] == 2 and facts["compiled"] is row["compiled"] is True


def test_a_row_says_where_its_network_was_fitted_and_its_images_sampled(
    tmp_path, tiny_weights, finished, monkeypatch
):
    made = build(tmp_path, tiny_weights)
    folder = made.folder / made.sample_name
    (here,) = pipeline.run(made)
    assert "sampled_on" not in here and "fitted_on" not in here

    # One group of the images is lost, and sampled on another machine, where all is measured.
    done = np.load(folder / "images" / "groups.npy", mmap_mode="r+")
    done[1] = 0
    done.flush()
    (folder / "metrics.json").unlink()
    other = {"machine": "another"}
    monkeypatch.setattr(environment, "environment", lambda device=None: other)
    (there,) = pipeline.run(build(tmp_path, tiny_weights))

    assert there["environment"] == other
    assert there["sampled_on"] == [here["environment"], other]
    assert there["fitted_on"] == here["environment"]
    assert there["metrics"] == here["metrics"]


def test_a_picture_whose_title_is_of_another_measurement_is_drawn_again(
    tmp_path, tiny_weights, finished, capsys
):
    made = build(tmp_path, tiny_weights)
    folder = made.folder / made.sample_name
    before = (folder / "grid.png").read_bytes()
    (folder / "metrics.json").unlink()
    pipeline.run(build(tmp_path, tiny_weights, "eval.reference_images=9"))

    assert "drawn again" in capsys.readouterr().out
    assert (folder / "grid.png").read_bytes() != before
    assert record_checks.faults_of(made.folder) == []


def test_pngs_are_written_of_a_set_that_was_sampled_without(tmp_path, tiny_weights, finished):
    made = build(tmp_path, tiny_weights, "sampler.png=true")
    pngs = made.folder / made.sample_name / "png"
    assert not pngs.exists()
    pipeline.run(made)
    assert np.array_equal(images(made)[3, ..., 0], np.asarray(Image.open(pngs / "00003.png")))
    assert len(list(pngs.glob("*.png"))) == 12


def flipped(path):
    """Flip one bit of a file, near its end."""
    content = path.read_bytes()
    place = len(content) * 9 // 10
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize(
    ("file", "damage", "line"),
    [
        ("baked.safetensors", flipped, "made again from the states of its fit"),
        ("ddim3_n12/images/images.npy", flipped, "sampled again"),
        ("ddim3_n12/grid.png", flipped, "drawn again"),
        ("ddim3_n12/samples.json", Path.unlink, "written again"),
    ],
)
def test_what_is_damaged_in_a_finished_run_is_made_again_with_a_line(
    tmp_path, tiny_weights, finished, capsys, file, damage, line
):
    made = build(tmp_path, tiny_weights)
    before = {f: f.read_bytes() for f in made.folder.rglob("*") if f.is_file()}
    damage(made.folder / file)
    assert record_checks.faults_of(made.folder) or damage is Path.unlink
    capsys.readouterr()

    pipeline.run(build(tmp_path, tiny_weights))
    assert line in capsys.readouterr().out
    after = {f: f.read_bytes() for f in made.folder.rglob("*") if f.is_file()}
    volatile = {"samples.json", "state.pt"}  # seconds
    assert before.keys() == after.keys()
    assert not [f for f in after if after[f] != before[f] and f.name not in volatile]
    assert record_checks.faults_of(made.folder) == []


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("fit.json", flipped),
        ("fit.json", lambda path: path.write_text("{}")),
        ("layers.json", lambda path: path.write_text("[]")),
        ("intervals.png", flipped),
        (
            "ddim3_n12/metrics.json",
            lambda path: path.write_text(path.read_text().replace("1", "2")),
        ),
        ("ddim3_n12/samples.json", lambda path: path.write_text("not JSON")),
    ],
)
def test_what_can_not_be_made_again_is_refused_in_one_line(
    tmp_path, tiny_weights, finished, file, damage
):
    made = build(tmp_path, tiny_weights)
    damage(made.folder / file)
    with pytest.raises(ValueError, match=rf"{file}: damaged") as caught:
        pipeline.run(build(tmp_path, tiny_weights))
    assert "\n" not in str(caught.value)
    assert any(file in fault for fault in record_checks.faults_of(made.folder))


def test_a_network_that_is_gone_is_fitted_again_where_something_new_is_wanted(
    tmp_path, tiny_weights, finished, capsys, monkeypatch
):
    made = build(tmp_path, tiny_weights)
    before = (made.folder / "baked.safetensors").read_bytes()
    for name in ("baked.safetensors", "state.pt"):
        (made.folder / name).unlink()

    pipeline.run(made)
    assert "the record stands" in capsys.readouterr().out, "its row is there: nothing is done"
    assert not (made.folder / "baked.safetensors").exists()

    other = build(tmp_path, tiny_weights, "sampler.steps=2")
    assert cost.stages_done(other) == (False, False) and cost.stages_done(made) == (True, True)
    pipeline.run(other)
    assert "fitting again" in capsys.readouterr().out
    assert (made.folder / "baked.safetensors").read_bytes() == before
    assert record_checks.faults_of(made.folder) == []

    # Other bits than the recorded ones are refused, and leave nothing behind.
    (made.folder / "baked.safetensors").unlink()
    names = sorted(f for f in made.folder.rglob("*"))
    third = build(tmp_path, tiny_weights, "sampler.steps=4")
    monkeypatch.setattr(stored_network, "state_hash", lambda state: "0" * 16)
    with pytest.raises(ValueError, match="is not the network of"):
        pipeline.run(third)
    left = {f for f in made.folder.rglob("*") if f not in names}
    assert {f.relative_to(made.folder).parts[0] for f in left} <= {third.sample_name, "failed.json"}

    # So is a place where others come out, and a record without a hash, before it begins.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        with pytest.raises(ValueError, match=r"other bits come out \(threads 1, here 77\)"):
            pipeline.run(third)

    fit = files.read_json(made.folder / "fit.json")
    versions = fit["facts"]["environment"]["versions"]
    assert "triton" not in versions, (
        "a fit that names none was made without, or before it was noted"
    )
    other = fit["facts"] | {"environment": {"versions": versions | {"triton": "0.1"}}}
    files.write_json(made.folder / "fit.json", fit | {"facts": other})
    with pytest.raises(ValueError, match=r"other bits come out \(triton 0.1, here None\)"):
        pipeline.run(third)
    files.write_json(made.folder / "fit.json", fit)

    record = files.read_json(made.folder / "fit.json")
    del record["facts"]["network"]
    files.write_json(made.folder / "fit.json", {k: v for k, v in record.items() if k != "seal"})
    with pytest.raises(ValueError, match="states no hash of it"):
        pipeline.run(third)


def test_a_damaged_network_without_states_is_refused_by_every_reader(
    tmp_path, tiny_weights, finished
):
    made = build(tmp_path, tiny_weights)
    (made.folder / "state.pt").unlink()
    packed = pack(made.folder)
    expected = tdq_exp.load(packed).state_dict()

    flipped(made.folder / "baked.safetensors")
    for read in (
        lambda: tdq_exp.load(made.folder),
        lambda: pipeline.run(build(tmp_path, tiny_weights)),
    ):
        with pytest.raises(ValueError, match=r"baked\.safetensors: damaged"):
            read()

    # Where there is none, the packed one is as good.
    (made.folder / "baked.safetensors").unlink()
    found = tdq_exp.load(made.folder).state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    # Another run's network, or record, is not this one's.
    record = files.read_json(made.folder / "fit.json")
    other = record["parts"] | {"seed": 7}
    stated = {"parts": other, "fingerprint": files.fingerprint(other)}
    files.write_json(made.folder / "fit.json", record | stated)
    with pytest.raises(ValueError, match=r"packed\.safetensors: belongs to another fit"):
        tdq_exp.load(made.folder)
    assert len(record_checks.faults_of(made.folder)) >= 3  # the network, the set and the row


def test_images_of_another_set_are_refused(tmp_path, tiny_weights, finished):
    made = build(tmp_path, tiny_weights)
    folder = made.folder / made.sample_name
    of = files.read_json(folder / "samples.json")["fingerprint"]
    store = sample_stage.store_of(made, folder, of)
    store.put(0, store.read()[4:8])
    with pytest.raises(ValueError, match="not the images that were measured"):
        pipeline.run(build(tmp_path, tiny_weights))
    assert "are not the images that were measured" in record_checks.faults_of(made.folder)[0]


def test_caches_that_are_damaged_are_made_again(tmp_path, tiny_weights, capsys):
    cache = tmp_path / "cache"
    quick = [*QUICK, f"model.weights={tiny_weights}", f"data.cache={cache}"]
    (first,) = pipeline.run(jobs.build(compose([*quick, f"out={tmp_path / 'one'}"])))
    cached = [f for f in cache.rglob("*") if f.is_file() and f.parent.name != "kernels"]
    for file in cached:
        flipped(file)
    capsys.readouterr()
    (second,) = pipeline.run(jobs.build(compose([*quick, f"out={tmp_path / 'two'}"])))
    said = capsys.readouterr().out
    assert second["metrics"] == first["metrics"] and second["image_set"] == first["image_set"]
    assert {file.parent.name for file in cached} == {"images", "features", "calibration"}
    assert all(word in said for word in ("decoded again", "computed again", "searched again"))


@pytest.mark.parametrize("sampler", ["ddpm", "pndm"])
@pytest.mark.parametrize("method", ["lsq", "ptq4dm"])
def test_every_sampler_takes_a_fit_to_a_row(tmp_path, tiny_weights, finished, method, sampler):
    made = build(
        tmp_path, tiny_weights, f"method={method}", f"sampler={sampler}", "sampler.steps=5"
    )
    (row,) = pipeline.run(made)
    assert row["images"] == 12 and np.isfinite(list(row["metrics"].values())).all()
    assert images(made).std() > 1


def test_more_images_begin_with_the_same_images(tmp_path, tiny_weights, finished):
    few, many = build(tmp_path, tiny_weights), build(tmp_path, tiny_weights, "sampler.images=18")
    pipeline.run(few)
    pipeline.run(many)
    assert np.array_equal(images(many)[:12], images(few))


def test_another_sampler_samples_again_and_does_not_train_again(
    tmp_path, tiny_weights, finished, monkeypatch
):
    pipeline.run(build(tmp_path, tiny_weights))
    monkeypatch.setattr(Qat, "run", None)
    (row,) = pipeline.run(build(tmp_path, tiny_weights, "sampler.steps=4"))
    assert row["sample"] == "ddim4_n12"


def test_another_configuration_under_the_same_name_is_refused_with_the_difference(
    tmp_path, tiny_weights, finished
):
    pipeline.run(build(tmp_path, tiny_weights))
    with pytest.raises(ValueError, match=r"fit\.lr: 0\.001 -> 0\.5.*label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, "fit.lr=0.5"))
    with pytest.raises(ValueError, match=r"sampler\.method\.clip: False -> True"):
        pipeline.run(build(tmp_path, tiny_weights, "sampler.clip=true"))


def test_a_path_is_not_part_of_a_fingerprint_but_its_content_is(tmp_path, tiny_weights, finished):
    first = build(tmp_path, tiny_weights)
    pipeline.run(first)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_weights.read_bytes())
    pipeline.run(build(tmp_path, copy))  # the same weights elsewhere: already done
    other = tmp_path / "other.safetensors"
    net = first.model.build(seed=9)
    from tdq_exp.models.weights.fill import save_weights

    save_weights(net, other, {})
    with pytest.raises(ValueError, match="weights:"):
        pipeline.run(build(tmp_path, other))


def test_best_of_5_samples_every_kept_checkpoint_and_says_so(tmp_path, tiny_weights):
    made = build(tmp_path, tiny_weights, "fit.report=best_of_5")
    (row,) = pipeline.run(made)
    assert row["report"] == "best_of_5"
    assert row["sample"].endswith("_best5")
    distances = [candidate["metrics"]["fid"] for candidate in row["candidates"]]
    assert len(distances) == 2  # two validations were made
    assert row["metrics"]["fid"] == min(distances)

    of_each = (made.folder / made.sample_name).glob("update*/metrics.json")
    seconds = [json.loads(file.read_text())["rows"][0]["seconds"] for file in of_each]
    for stage in ("sample", "measure"):
        assert row["seconds"][stage] == pytest.approx(sum(s[stage] for s in seconds))
    assert row["seconds"]["fit"] == seconds[0]["fit"] == seconds[1]["fit"]

    # Whoever takes the run's network gets the one that its row is of.
    assert (
        row["validation_loss"] == dict(read_fit(made.folder)["facts"]["validation"])[row["update"]]
    )
    _, net = load(made.folder)
    of_row = stored_network.finished_net(
        made, row["fingerprints"]["fit"], torch.device("cpu"), best_file(made.folder, row["update"])
    )
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in of_row.state_dict().items())
    with pytest.raises(ValueError, match="packed.safetensors: is reserved for the last network"):
        pack(made.folder)

    # Its set, and the set of each checkpoint, are drawn again as they are.
    best = made.folder / made.sample_name
    sets = {best: row["update"]}
    sets |= {folder: int(folder.name.removeprefix("update")) for folder in best.glob("update*")}
    assert len(sets) == 3
    for number, (folder, update) in enumerate(sets.items()):
        out = tmp_path / f"drawn{number}"
        assert sample.main([str(folder), "--images", "12", "--out", str(out), "--cpu"]) == 0
        stored = np.load(best / f"update{update}" / "images" / "images.npy")
        assert np.array_equal(np.load(out / "images" / "images.npy"), stored)

    unmeasured = tmp_path / "unmeasured"
    shutil.copytree(made.folder, unmeasured, ignore=shutil.ignore_patterns("ddim*"))
    with pytest.raises(ValueError, match="best of several checkpoints .*none is measured yet"):
        load(unmeasured)

    # Its records, and the row of the best, are brought up to date as others are.
    _as_an_earlier_version(made.folder)
    files_of_rows = sorted(made.folder.rglob("metrics.json"))
    before = {file: [row["metrics"] for row in read_rows(file)] for file in files_of_rows}
    assert len(before) == 3

    # Not ours: a file of the tracker's.
    (made.folder / "wandb").mkdir()
    (made.folder / "wandb" / "summary.json").write_text("{}")
    for rewritten in ("1 of 1", "0 of 1"):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "migrate_records.py", tmp_path / "runs"],
            capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0 and f"{rewritten} runs rewritten" in done.stdout, done.stderr
        after = {file: [row["metrics"] for row in read_rows(file)] for file in files_of_rows}
        assert after == before
        assert [fault for file in files_of_rows for fault in row_faults(file)] == []
    assert (made.folder / "wandb" / "summary.json").read_text() == "{}"
    assert pipeline.run(made) == [row]


def _as_an_earlier_version(run):
    """Rewrite a run's records as one that called the zero point an offset would have."""

    def renamed(groups):
        tdq = {"offset" if k == "zero_point" else k: v for k, v in groups["tdq"].items()}
        return {**groups, "tdq": tdq}

    rows = {file: read_rows(file) for file in run.rglob("metrics.json")}
    fit = files.read_json(run / "fit.json")
    parts = renamed(fit["parts"])
    of_fit = files.fingerprint(parts)
    sets = {}
    for file in run.rglob("samples.json"):
        record = files.read_json(file)
        of_set = record["parts"] | {"fit": of_fit}
        sets[record["fingerprint"]] = files.fingerprint(of_set)
        new = {"parts": of_set, "fingerprint": files.fingerprint(of_set)}
        files.write_json(file, record | new)

    config = {"config": renamed(fit["config"])}
    files.write_json(run / "fit.json", fit | config | {"parts": parts, "fingerprint": of_fit})
    for file, found in rows.items():
        for row in found:
            features = [row["features"]["name"], row["features"]["weights"]]
            sample = sets[row["fingerprints"]["sample"]]
            measured = measure_parts(sample, features, parts["data"], row["config"]["eval"])
            row["config"] = renamed(row["config"])
            measure = files.fingerprint(measured)
            row["fingerprints"] = {"fit": of_fit, "sample": sample, "measure": measure}
        write_rows(file, [files.sealed(row) for row in found])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tmp_path, tiny_weights, monkeypatch
):
    calls = []

    def spoiled(eps_hat, eps, kind):
        calls.append(kind)
        # updates 1 and 2, two batches of validation, update 3
        return noise_prediction_loss(eps_hat, eps, kind) * (
            float("nan") if len(calls) == 5 else 1.0
        )

    monkeypatch.setattr(pixel, "noise_prediction_loss", spoiled)
    with pytest.raises(FloatingPointError, match=r"loss is nan at update 3: .*update 2 is kept"):
        pipeline.run(build(tmp_path, tiny_weights))
    state = torch.load(tmp_path / "runs/tiny_w4a4_lsq_tdq/seed0/state.pt", weights_only=True)
    assert state["update"] == 2
    monkeypatch.undo()
    (row,) = pipeline.run(build(tmp_path, tiny_weights))  # and from there it goes on
    assert np.isfinite(row["metrics"]["fid"])


def test_a_finished_run_can_be_loaded_and_sampled(tmp_path, tiny_weights, finished, inside):
    made = build(tmp_path, tiny_weights)
    pipeline.run(made)
    net = tdq_exp.load(made.folder)
    assert not net.training
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    assert net(x, t, return_dict=False)[0].shape == x.shape
    done = inside(str(made.folder), "--images", "4", "--out", "drawn", verb="sample")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 4
    drawn = np.load(tmp_path / "drawn" / "images" / "images.npy")
    assert np.array_equal(drawn, images(made)[:4])  # the run's own batch and seed

    # As another of its sets, which is named.
    other = build(tmp_path, tiny_weights, "sampler.steps=4", "sampler.seed=3")
    pipeline.run(other)
    of_set = made.folder / other.sample_name
    done = inside(str(of_set), "--images", "4", "--out", "other", verb="sample")
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "other" / "images" / "images.npy")
    assert np.array_equal(drawn, images(other)[:4])
    (of_set / "metrics.json").unlink()
    done = inside(str(of_set), "--out", "third", verb="sample")
    assert done.returncode == 2 and "has no row, which says how" in done.stderr

    again = inside(str(made.folder), "--out", "drawn", verb="sample")
    assert again.returncode == 2
    assert "not empty" in again.stderr


def kill_one_of_two(folder, arguments):
    """Begin a run in two processes, kill one when the fit has begun, and look how the other ends."""
    stderr = folder.parents[3] / "stderr.txt"
    launcher = processes.start(processes.command_line, arguments, stderr)
    while not (folder / "fit.json").exists():
        assert launcher.is_alive(), stderr.read_text()
        time.sleep(0.02)
    assert json.loads((folder / ".lock").read_text())["host"]

    first, second = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    assert processes.wait([launcher], timeout=60) == 137
    errors = [line for line in stderr.read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and f"(pid {second}) was ended by SIGKILL" in errors[0]
    assert not Path(f"/proc/{first}").exists()


def test_two_processes_make_the_same_images_and_one_row(
    tmp_path, tiny_weights, finished, inside, monkeypatch
):
    """By torch's launcher, which starts Python anew."""
    # Fits differ in the last bits, and rounding amplifies that: images of one and the same fit.
    made = build(tmp_path, tiny_weights)
    folder, before = made.folder / made.sample_name, images(made).copy()
    for file in ("images/images.npy", "images/groups.npy", "metrics.json"):
        (folder / file).unlink()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Where there is no GPU, nobody has to say that there is none.
    quick = [o for o in QUICK if o != "launcher=cpu" or torch.accelerator.is_available()]
    done = inside(
        *quick, f"model.weights={tiny_weights}", f"out={tmp_path}",
        "launcher.nproc=2", "launcher.threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.array_equal(images(made), before)
    (row,) = json.loads((folder / "metrics.json").read_text())["rows"]
    assert row["processes"] == 2


def test_two_processes_fit_as_one_does(tmp_path, tiny_weights, default_run, together, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    qat = [*QUICK, f"model.weights={tiny_weights}", "launcher.threads=1"]
    pretrain = [
        "model=tiny", "method=fp", "fit=pretrain", "tracker=none", "launcher=cpu",
        "launcher.threads=1",
    ]  # fmt: skip
    out = f"out={tmp_path}"
    kill_one_of_two(tmp_path / "runs/tiny_w4a4_lsq_tdq/seed0", [*qat, out, "launcher.nproc=2"])
    assert together(*qat, out, "--", *pretrain, out) == 0

    # Quantization-aware training.
    one, two = (
        files.read_json(folder / "runs/tiny_w4a4_lsq_tdq/seed0/fit.json")
        for folder in (default_run, tmp_path)
    )
    assert two["facts"]["processes"] == 2
    assert one["fingerprint"] == two["fingerprint"]
    # Before rounding has had the time to amplify the last bits of a sum: a flipped code moves a net of 8 channels by 1 %.
    first, other = (found["facts"]["validation"][0] for found in (one, two))
    assert first[0] == other[0] == 2
    assert first[1] == pytest.approx(other[1], rel=1e-5)

    # A float net.
    folder = tmp_path / "runs/tiny_fp_pretrain/seed0"
    assert json.loads((folder / "fit.json").read_text())["facts"]["processes"] == 2
    found = [load_file(tiny_weights), load_file(folder / "weights.safetensors")]
    for key, value in found[0].items():
        # Softmax does not see the bias of k: its gradient is zero but for last bits, which Adam makes as large as any.
        assert key.endswith("to_k.bias") or torch.allclose(
            value, found[1][key], rtol=1e-4, atol=2e-6
        ), key


def test_a_sweep_writes_three_fits_under_the_right_names(tmp_path, tiny_weights, inside):
    done = inside(
        "-m", *QUICK, f"model.weights={tiny_weights}", f"out={tmp_path}", "bits=w8a8,w4a4,w3a3"
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["tiny_w3a3_lsq_tdq", "tiny_w4a4_lsq_tdq", "tiny_w8a8_lsq_tdq"]
    summary = done.stdout[done.stdout.index("jobs of the sweep") :]
    assert all(name in summary for name in names) and summary.count("done") == 3
    assert summary.count("Frechet distance ") == 3


def test_an_offline_wandb_run_can_be_read_back(tmp_path, tiny_weights, inside, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = inside(*QUICK, f"model.weights={tiny_weights}", f"out={tmp_path}", "tracker=offline")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs/tiny_w4a4_lsq_tdq/seed0/wandb").glob("offline-run-*")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", str(run), "--json"]
    read = subprocess.run(leet, capture_output=True, text=True, timeout=60)
    assert read.returncode == 0, read.stderr
    assert "validation_loss" in read.stdout
    assert "fid" in read.stdout
    assert '"resume":true' in read.stdout  # so `wandb sync` appends a later part of the fit
    again = inside(*QUICK, f"model.weights={tiny_weights}", f"out={tmp_path}", "tracker=offline")
    assert again.returncode == 0, again.stderr
    assert list(run.parent.glob("offline-run-*")) == [
        run
    ]  # nothing was left to do, so nothing is said


MISTAKES = [
    (["bits.act=17"], "bits.act=17"),
    (["model.weights=missing.safetensors"], "missing.safetensors"),
    (["fit.batch_size=5000"], "fit.batch_size=5000"),
    (["tdq=s10", "tdq.interval.groups=5000"], "tdq.interval.groups=5000"),
    (["sampler.spacing=cosine"], "sampler.spacing='cosine'"),
    (["out=/proc/nowhere"], "/proc/nowhere"),
]


@pytest.mark.parametrize(
    "way, overrides, said", [("process", *MISTAKES[1]), *(("inside", *m) for m in MISTAKES)]
)
def test_a_mistake_on_the_command_line_is_one_line_without_a_traceback(
    tmp_path, tiny_weights, inside, way, overrides, said
):
    arguments = [*QUICK, f"model.weights={tiny_weights}", f"out={tmp_path}", *overrides]
    if way == "inside":
        done = inside(*arguments)
        code, stderr = done.returncode, done.stderr
    else:
        file = tmp_path / "stderr.txt"
        code = processes.wait([processes.start(processes.command_line, arguments, file)])
        stderr = file.read_text()
    assert code == 2
    assert said in stderr
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == 1


def test_plan_only_prints_and_writes_nothing(tmp_path, tiny_weights, inside):
    done = inside(
        *QUICK, f"model.weights={tiny_weights}", f"out={tmp_path / 'none'}", "plan_only=true"
    )
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    assert not (tmp_path / "none").exists()


def test_paper_scale_without_a_gpu_stops_and_says_what_to_do(tmp_path, inside):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    done = inside("+experiment=ddim_w4a4_lsq_tdq", f"out={tmp_path}")
    assert done.returncode == 2
    assert "ddim_small" in done.stderr
    assert "35,746,307" in done.stdout


def test_the_integer_engine_samples_the_same_fit_into_a_row_of_its_own(
    tmp_path, tiny_weights, finished, monkeypatch
):
    from tdq_exp.deploy import integer

    integers = ["sampler.engine=integer", "sampler.min_speedup=0"]
    (simulated,) = pipeline.run(build(tmp_path, tiny_weights))
    made = build(tmp_path, tiny_weights, *integers)
    (row,) = pipeline.run(made)
    assert row["fingerprints"]["fit"] == simulated["fingerprints"]["fit"]
    assert row["sample"] == "ddim3_n12_integer0" and simulated["engine"] == "fake"
    before = images(made).copy()
    if row["engine"].startswith("integer"):
        assert (made.folder / made.sample_name / "engine.json").exists()
    fake = images(build(tmp_path, tiny_weights))
    assert (
        np.abs(before.astype(int) - fake).mean() < 3
    )  # of 255: trajectories part, but not from the start
    done = np.load(made.folder / made.sample_name / "images" / "groups.npy", mmap_mode="r+")
    done[1] = 0
    done.flush()
    (made.folder / made.sample_name / "metrics.json").unlink()
    pipeline.run(build(tmp_path, tiny_weights, *integers))
    assert np.array_equal(images(made), before)

    # Its record names the engine; without it, the row does.
    record = made.folder / made.sample_name / "samples.json"
    assert files.read_json(record)["engine"] == row["engine"]
    record.unlink()
    pipeline.run(build(tmp_path, tiny_weights, *integers))
    assert files.read_json(record)["engine"] == row["engine"]

    # Where there are no integers, the finished set keeps its name, and is not gone on with.
    monkeypatch.setattr(integer, "unavailable", lambda device: "none here")
    (made.folder / made.sample_name / "metrics.json").unlink()
    (measured,) = pipeline.run(build(tmp_path, tiny_weights, *integers))
    assert measured["engine"] == row["engine"]
    if row["engine"].startswith("integer"):
        done[1] = 0
        done.flush()
        with pytest.raises(ValueError, match="were begun with the engine 'integer: .* none here"):
            pipeline.run(build(tmp_path, tiny_weights, *integers))


def test_without_integer_kernels_quantization_is_simulated_and_a_line_says_why(
    tmp_path, tiny_weights, finished, monkeypatch, capsys
):
    from tdq_exp.deploy import integer

    monkeypatch.setattr(integer, "unavailable", lambda device: "this torch has no oneDNN kernels")
    made = build(tmp_path, tiny_weights, "sampler.engine=integer")
    (row,) = pipeline.run(made)
    assert row["engine"] == "fake: this torch has no oneDNN kernels"
    assert "sampler.engine=integer: this torch has no oneDNN kernels" in capsys.readouterr().out
    pipeline.run(build(tmp_path, tiny_weights))
    assert np.array_equal(images(made), images(build(tmp_path, tiny_weights)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.spacing=foo"], r"sampler\.spacing='foo'"),
        (["sampler.offset=999"], r"sampler: leading spacing .*offset=999"),
        (["sampler=pndm", "sampler.steps=3"], r"sampler\.steps=3: this sampler needs at least 4"),
        (["sampler=pndm", "sampler.clip=true", "sampler.steps=5"], r"sampler\.clip=true"),
        (["fit.ema_decay=1.5"], r"fit\.ema_decay=1\.5: must be below 1"),
        (
            ["method=ptq4dm", "tdq=none", "fit.correction=ptqd", "sampler=ddpm"],
            r"fit\.correction: .*take sampler=ddim",
        ),
    ],
)
def test_what_sampling_will_refuse_is_refused_before_a_file_is_written(
    overrides, message, tmp_path, tiny_weights
):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", tiny_weights, *overrides)
    assert not (tmp_path / "out").exists()
