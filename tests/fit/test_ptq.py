"""Post-training quantization as whole runs of a tiny model: every method, stopped and not stopped, alone and together."""

from __future__ import annotations

import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tdq_exp
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import measure_stage, pipeline
from tdq_exp.fit.options import ReconstructOptions
from tdq_exp.fit.ptq import block_by_block, calibration_set, ptq
from tdq_exp.fit.ptq.over_time import Values, fit_over_time, observed
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.rules.minmax import MinMax
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint
from tdq_exp.runtime import figures
from tests.quant.builders import INTERVALS, STEPS, randn

QUICK = [
    "model=tiny", "tracker=none", "launcher=cpu", "bits=w4a3", "calibration.samples=8", 
    "fit.validation_samples=4", "sampler.images=4",
]  # fmt: skip
ROUNDING = ["fit.rounding_updates=3", "fit.lr_rounding=0.3"]
BLOCKS = 17
ROOT = Path(tdq_exp.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch, few_start_values):
    """Drawing takes longer than fitting a tiny net."""
    blank = Image.new("L", (1, 1))  # a picture, and quickly
    monkeypatch.setattr(figures, "sample_grid", lambda rows, path, *rest: blank.save(path))
    monkeypatch.setattr(
        figures, "intervals_over_time", lambda tables, path, *rest: blank.save(path)
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where finished runs of this file are kept: who asks for one a second time gets it as it is."""
    return tmp_path_factory.mktemp("shared")


@lru_cache
def composed(*overrides):
    return compose(overrides)


def build(out, weights, *overrides):
    return jobs.build(
        composed(*QUICK, *ROUNDING, f"out={out}", f"model.weights={weights}", *overrides)
    )


def cell(method="ptq4dm", tdq="none", rounding="nearest"):
    narrow = ["tdq.interval.width=8"] if tdq == "temporal" else []
    return f"method={method}", f"tdq={tdq}", f"fit.rounding={rounding}", *narrow


def facts(made):
    return json.loads((made.folder / "fit.json").read_text())["facts"]


def images(made):
    return np.load(made.folder / made.sample_name / "images" / "images.npy")


def assert_same_bits(made, other):
    one, two = (load_file(run.folder / "baked.safetensors") for run in (made, other))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key
    assert np.array_equal(images(made), images(other))


def sets(cache):
    return sorted((cache / "calibration_sets").glob("*"))


@pytest.mark.parametrize("tdq", ["none", "temporal", "s10"])
@pytest.mark.parametrize(
    "method, rounding", [("minmax", "nearest"), ("ptq4dm", "nearest"), ("ptq4dm", "adaround")]
)
def test_every_method_goes_from_float_net_to_row(shared, tiny_weights, method, tdq, rounding):
    made = build(shared, tiny_weights, *cell(method, tdq, rounding))
    (row,) = pipeline.run(made)
    names = ["tiny_w4a3", method, {"none": "", "temporal": "tdq", "s10": "s10"}[tdq]]
    names.append("adaround" if rounding == "adaround" else "")
    assert row["name"] == made.name == "_".join(name for name in names if name)
    assert row["images"] == 4 and np.isfinite(list(row["metrics"].values())).all()
    found = facts(made)
    assert np.isfinite(found["validation_loss"])
    reconstructed = [block["block"] for block in found["blocks"]]
    assert sorted(reconstructed) == ([] if method == "minmax" else block_names(made))
    assert (found["over_time"] is not None) == (method == "minmax" and tdq != "none")
    for block in found["blocks"]:
        assert block["kept"] == (block["held_out_after"] < block["held_out_before"])
        assert np.isfinite([block["train_before"], block["train_after"]]).all()
    assert found["blocks_not_kept"] == [
        block["block"] for block in found["blocks"] if not block["kept"]
    ]
    baked = load_file(made.folder / "baked.safetensors")
    codes = [value for key, value in baked.items() if key.endswith("weight_quantizer.codes")]
    assert len(codes) == 51 and all(
        int(value.min()) >= 0 and int(value.max()) <= 15 for value in codes
    )
    assert baked["conv_in.weight_quantizer.zero_point"].shape == (8, 1, 1, 1)
    steps = {len(value) for key, value in baked.items() if key.endswith("interval.step_sizes")}
    assert steps == ({1} if tdq == "none" else {1000})

    # Groups that all keep the start value would be one static step size.
    if tdq == "s10" and method == "minmax":
        last = [value for key, value in baked.items() if key.endswith("interval.step_sizes")][-1]
        assert 1 < len(last.unique()) <= 10


def block_names(made):
    """In alphabetical order."""
    return sorted({role.block for role in made.model.roles(made.model.build()).values()})


@pytest.mark.parametrize("tdq", ["none", "temporal"])
def test_adaround_changes_codes_by_at_most_one_of_what_nearest_gives(shared, tiny_weights, tdq):
    nearest, rounded = (
        build(shared, tiny_weights, *cell(tdq=tdq, rounding=r)) for r in ("nearest", "adaround")
    )
    pipeline.run(nearest), pipeline.run(rounded)
    one, two = (load_file(made.folder / "baked.safetensors") for made in (nearest, rounded))
    changed = 0
    for key in one:
        if key.endswith("codes"):
            difference = one[key].int() - two[key].int()
            assert int(difference.abs().max()) <= 1, key
            changed += int((difference != 0).sum())
        elif "weight_quantizer" in key or ".bias" in key or "norm" in key:
            assert torch.equal(one[key], two[key]), (
                key
            )  # steps, zero points, biases and norms are not trained
    assert changed > 50


def test_a_finished_run_can_be_loaded(shared, tiny_weights):
    made = build(shared, tiny_weights, *cell(tdq="temporal", rounding="adaround"))
    pipeline.run(made)
    net = tdq_exp.load(made.folder)
    baked = load_file(made.folder / "baked.safetensors")
    assert all(torch.equal(value, baked[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_stopped_fit_ends_with_the_bits_of_one_that_was_not(
    shared, tmp_path, tiny_weights, dropout
):
    options = list(cell(tdq="temporal", rounding="adaround"))
    options += [f"tdq.interval.dropout={dropout}", "label=dropout"] if dropout else []
    whole = build(shared, tiny_weights, *options)
    pipeline.run(whole)
    with pytest.raises(InterruptedError, match="stopped after block 3, as asked"):
        pipeline.run(build(tmp_path, tiny_weights, *options, "fit.stop_after=3"))
    stopped = build(tmp_path, tiny_weights, *options)
    files = sorted((stopped.folder / "blocks").glob("*.pt"))
    assert [file.name for file in files] == ["000.pt", "001.pt", "002.pt"]
    before = [file.stat().st_mtime_ns for file in files]
    torch.manual_seed(99)  # of no account
    pipeline.run(stopped)
    assert [
        file.stat().st_mtime_ns for file in files
    ] == before  # what was there was not made again
    assert_same_bits(whole, stopped)
    timeless = [
        [
            {key: value for key, value in block.items() if key != "seconds"}
            for block in facts(made)["blocks"]
        ]
        for made in (whole, stopped)
    ]
    assert timeless[0] == timeless[1]


def test_a_kill_within_a_block_makes_that_block_again(shared, tmp_path, tiny_weights, monkeypatch):
    whole, made = (build(out, tiny_weights, *cell()) for out in (shared, tmp_path))
    pipeline.run(whole)
    save, saved = block_by_block.save_state, []

    def killed(file, state):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(file)
        save(file, state)

    with monkeypatch.context() as patch:
        patch.setattr(block_by_block, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(made)
    pipeline.run(build(tmp_path, tiny_weights, *cell()))
    assert_same_bits(whole, made)
    assert not (made.folder / "blocks" / "spill").exists()


def test_a_small_memory_budget_gives_the_same_bits(shared, tmp_path, tiny_weights, monkeypatch):
    options = cell(tdq="temporal", rounding="adaround")
    large, small = (
        build(shared, tiny_weights, *options),
        build(tmp_path, tiny_weights, *options, "fit.memory_gb=1e-6"),
    )
    pipeline.run(large)
    spill, files = block_by_block.Spill, []
    monkeypatch.setattr(
        block_by_block,
        "Spill",
        lambda rows, shape, file, dtype: files.append(file) or spill(rows, shape, file, dtype),
    )
    pipeline.run(small)
    assert sum(file is not None for file in files) > BLOCKS
    assert_same_bits(large, small)
    assert sorted(path.name for path in (small.folder / "blocks").iterdir()) == [
        f"{n:03d}.pt" for n in range(BLOCKS)
    ]


def test_a_set_is_made_once_and_shared(tmp_path, tiny_weights, monkeypatch):
    made, make = [], calibration_set._trajectories
    monkeypatch.setattr(
        calibration_set, "_trajectories", lambda *rest: made.append(1) or make(*rest)
    )
    options = "calibration.seed=11", "fit.updates=1"
    first = build(tmp_path, tiny_weights, *cell(), *options)
    cache = first.data.cache
    before = sets(cache)
    pipeline.run(first)
    (folder,) = set(sets(cache)) - set(before)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    second = build(tmp_path, tiny_weights, *cell("ptq4dm", "s10"), *options, "fit.stop_after=1")
    with pytest.raises(InterruptedError, match="stopped after block 1"):
        pipeline.run(second)  # it has found its set by then
    assert len(made) == 1 and len(sets(cache)) == len(before) + 1
    assert times == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    elsewhere = folder.rename(tmp_path / "a set")
    given = build(
        tmp_path / "given", tiny_weights, *cell(), *options, f"calibration.path='{elsewhere}'"
    )
    pipeline.run(given)  # a set that is named is used where it is, and counts as the same
    assert len(made) == 1 and sets(cache) == before
    marks = [
        json.loads((run.folder / "fit.json").read_text())["fingerprint"] for run in (first, given)
    ]
    assert marks[0] == marks[1]
    assert_same_bits(first, given)


def test_a_named_set_of_another_seed_is_refused(shared, tmp_path, tiny_weights):
    made = build(shared, tiny_weights, *cell())
    pipeline.run(made)
    cache = made.data.cache
    # Among them may be an imported one, which has no such part: their order is that of hashes.
    parts = {f: json.loads((f / "about.json").read_text())["parts"] for f in sets(cache)}
    folder = next(f for f, of in parts.items() if of.get("calibration", {}).get("kind") == "ndtc")
    other = build(
        tmp_path, tiny_weights, *cell(), f"calibration.path={folder}", "calibration.seed=5"
    )
    with pytest.raises(
        ValueError, match=r"calibration set of other parts \(calibration\.seed: 0 -> 5\)"
    ):
        pipeline.run(other)


def test_blocks_that_get_worse_keep_their_start_values_and_say_so(tmp_path, tiny_weights, capsys):
    wild = ["fit.lr=50", "fit.lr_zero_point=0.9", "label=wild"]
    worse = build(tmp_path, tiny_weights, *cell(rounding="adaround"), "fit.lr_rounding=40", *wild)
    pipeline.run(worse)
    said = capsys.readouterr().out
    found = facts(worse)
    assert sorted(found["blocks_not_kept"]) == block_names(worse)  # all of them
    for block in found["blocks"]:
        assert f"{block['block']}: no better on held-out samples, keeps its start values" in said
        assert block["held_out_after"] >= block["held_out_before"]
    start = build(tmp_path, tiny_weights, *cell(), "fit.reconstruct=false", "label=start")
    pipeline.run(start)
    assert_same_bits(worse, start)


def test_a_better_block_is_kept_and_a_worse_one_put_back(shared, tmp_path, tiny_weights):
    made = build(shared, tiny_weights, *cell(tdq="s10"))
    # All groups start with the step size that a static one has.
    start = build(tmp_path, tiny_weights, *cell(), "fit.reconstruct=false")
    pipeline.run(made), pipeline.run(start)
    one, two = (load_file(run.folder / "baked.safetensors") for run in (made, start))
    kept = {block["block"]: block["kept"] for block in facts(made)["blocks"]}
    assert set(kept.values()) == {True, False}
    for name, better in kept.items():
        tables = [key for key in one if key.startswith(f"{name}.") and key.endswith("step_sizes")]
        assert tables
        same = all(torch.equal(one[key], two[key].expand_as(one[key])) for key in tables)
        assert same == (not better), name


def test_the_same_command_again_does_nothing(shared, tiny_weights, monkeypatch):
    made = build(shared, tiny_weights, *cell(tdq="temporal"))
    first = pipeline.run(made)
    everything = [
        *made.folder.rglob("*"),
        *(f for folder in sets(made.data.cache) for f in folder.iterdir()),
    ]
    before = {file: file.stat().st_mtime_ns for file in everything if file.is_file()}
    for name in ("fit_to_set", "make_set"):
        monkeypatch.setattr(ptq, name, None)  # would be called if anything were made again
    monkeypatch.setattr("tdq_exp.fit.quantized.calibrated", None)
    monkeypatch.setattr(measure_stage, "measure", None)
    assert pipeline.run(build(shared, tiny_weights, *cell(tdq="temporal"))) == first
    assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.fixture
def stopped(tmp_path, tiny_weights):
    """A fit of which two blocks are done."""
    with pytest.raises(InterruptedError):
        pipeline.run(build(tmp_path, tiny_weights, *cell(), "fit.stop_after=2"))
    made = build(tmp_path, tiny_weights, *cell())
    return made, made.folder / "blocks" / "001.pt"


def test_block_files_of_another_fit_are_refused(stopped):
    made, file = stopped
    state = torch.load(file, weights_only=True)
    torch.save({**state, "fingerprint": "0123456789abcdef"}, file)
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(file))}: a block of another fit; remove .*blocks to start",
    ):
        pipeline.run(made)


def test_a_damaged_block_is_made_again_with_the_same_values_and_a_line(
    stopped, tmp_path, tiny_weights, capsys
):
    made, file = stopped
    whole, before = file.read_bytes(), torch.load(file, weights_only=True)
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(InterruptedError):
        pipeline.run(build(tmp_path, tiny_weights, *cell(), "fit.stop_after=2"))
    assert f"{file}: damaged (its content does not match its checksum): made again" in (
        capsys.readouterr().out
    )
    after = torch.load(file, weights_only=True)
    for name, state in before["quantizers"].items():
        assert all(torch.equal(state[key], after["quantizers"][name][key]) for key in state)


def test_another_number_of_a_begun_fit_is_refused_with_the_difference(
    stopped, tmp_path, tiny_weights
):
    with pytest.raises(ValueError, match=r"fit\.lr: 0\.01 -> 0\.02.*label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, *cell(), "fit.lr=0.02"))
    with pytest.raises(ValueError, match=r"fit\.power: 2\.4 -> 2\.0.*label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, *cell(), "fit.power=2.0"))


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["method=ptq4dm", "calibration.samples=17"], "calibration.samples=17: must be a positive multiple of calibration.images=8"),
        (["method=ptq4dm", "calibration.kind=normal"], "calibration.kind='normal': choose one of"),
        (["method=ptq4dm", "calibration=none"], "calibration.kind=none: does not go with fit.kind=ptq"),
        (["method=lsq", "calibration=uniform"], "calibration.kind=uniform: does not go with fit.kind=qat"),
        (["method=ptq4dm", "weight=lsq"], "weight.interval=static: does not go with fit.kind=ptq"),
        (["method=ptq4dm", "weight=pact"], "weight.interval=max_abs: does not go with fit.kind=ptq"),
        (["method=lsq", "weight=minmax"], "weight.interval=channel_range: does not go with fit.kind=qat"),
        (["method=ptq4dm", "weight.interval=per_step"], "weight.interval=per_step"),
        (["method=ptq4dm", "fit.memory_gb=0"], "fit.memory_gb=0.0: must be positive"),
        (["method=ptq4dm", "fit.rounding=up"], "fit.rounding='up': choose nearest or adaround"),
        (["method=ptq4dm", "fit.updates=0"], "fit.updates=0: must be at least 1"),
        (["method=ptq4dm", "fit.batch_size=0"], "fit.batch_size=0: must be at least 1"),
        (["method=ptq4dm", "fit.report=best_of_5"], "fit.report=best_of_5"),
        (["method=minmax", "calibration.images=0"], "calibration.samples=8: must be a positive multiple of calibration.images=0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_key(overrides, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}") as error:
        jobs.build(composed(*QUICK, "out=nowhere", "model.weights=none.safetensors", *overrides))
    assert "\n" not in str(error.value)


def test_adaround_without_a_reconstruction_is_refused(tiny_weights):
    # MinMax reconstructs nothing: the row would be named after a rounding that it does not have
    with pytest.raises(ValueError, match=r"fit\.rounding=adaround"):
        build("nowhere", tiny_weights, *cell("minmax", rounding="adaround"))


def test_another_calibration_of_a_begun_fit_is_refused_with_the_difference(
    stopped, tmp_path, tiny_weights
):
    with pytest.raises(ValueError, match=r"seed: 0 -> 5.*label=NAME"):
        pipeline.run(build(tmp_path, tiny_weights, *cell(), "calibration.seed=5"))


def test_a_uniform_set_of_more_steps_than_the_run_has_names_the_key(tmp_path, tiny_weights):
    made = build(tmp_path, tiny_weights, *cell("minmax"), "calibration.samples=32")
    with pytest.raises(
        ValueError, match=r"calibration\.samples=32: 4 of each trajectory, .* has 3 steps"
    ):
        pipeline.run(made)


def test_two_processes_make_the_same_set_and_the_same_fit(tmp_path, tiny_weights, together):
    cache, options = tmp_path / "cache", [
        *cell(tdq="temporal"), "calibration.images=66", "calibration.samples=66", "fit.updates=2",
        "launcher.threads=1", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    one, two = (build(tmp_path / name, tiny_weights, *options) for name in ("one", "two"))
    pipeline.run(one)
    (first,) = sets(cache)
    first = first.rename(tmp_path / first.name)
    shutil.rmtree(
        cache / "calibration"
    )  # nothing is left but the decoded images, and features of theirs
    out = f"out={tmp_path / 'two'}"
    assert together(*QUICK, *ROUNDING, f"model.weights={tiny_weights}", out, *options) == 0
    assert facts(two)["processes"] == 2
    (second,) = sets(cache)
    assert first.name == second.name
    for file in first.iterdir():  # two groups of trajectories, one for each
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert (np.load(first / "groups.npy") != 0).all()
    marks = [json.loads((run.folder / "fit.json").read_text())["fingerprint"] for run in (one, two)]
    assert marks[0] == marks[1]
    for number in range(BLOCKS):
        states = [
            torch.load(run.folder / f"blocks/{number:03d}.pt", weights_only=True)
            for run in (one, two)
        ]
        assert states[0]["report"]["kept"] == states[1]["report"]["kept"]
        for part in ("generators", "quantizers"):
            flat = [flattened(state[part]) for state in states]
            assert flat[0].keys() == flat[1].keys() and flat[0]
            for key, value in flat[0].items():
                assert torch.allclose(value, flat[1][key], rtol=1e-3, atol=1e-4), key


def flattened(state, prefix=""):
    found = {}
    for key, value in state.items():
        found |= (
            flattened(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return found


# MinMax + TDQ


def over_time(seed=0, updates=200, interval="temporal", **changed):
    """Two quantizers of tensors whose range shrinks with t; (errors before and after, their tables)."""
    torch.manual_seed(0)
    time, grid = TimeContext(STEPS), Grid(4, symmetric=False)
    sources, bank = INTERVALS[interval]().make(["one", "other"], time)
    quantizers = {
        "one": MinMax(grid, sources[0], ZeroPoint(grid)).eval(), "other": MinMax(grid, sources[1], LowerBound(grid)).eval()
    }  # fmt: skip
    if bank is not None:
        bank.eval()
    t = torch.arange(0, STEPS, 5)
    spread = (0.1 + 2 * (STEPS - t) / STEPS)[:, None]
    values = {
        "one": spread * randn(len(t), 64),
        "other": 5 * spread * randn(len(t), 64, seed=1).abs(),
    }
    quantizers["one"].start(0.4, 7), quantizers["other"].start(1.0, 0)
    numbers = ReconstructOptions(
        updates=updates, batch_size=32, lr=0.02, lr_zero_point=0.002, lr_generator=0.03
    )
    errors = fit_over_time(
        quantizers,
        values,
        t,
        time,
        numbers,
        seed,
        device=torch.device("cpu"),
        show=False,
        **changed,
    )
    return (
        errors,
        torch.stack([quantizer.tables()[0] for quantizer in quantizers.values()]),
        quantizers,
        values,
        t,
        time,
    )


def test_a_fit_over_time_lowers_the_error_and_follows_the_range():
    (before, after), tables, quantizers, values, t, time = over_time()
    assert after < 0.7 * before
    for table in tables:
        assert (
            table[:100].mean() > 1.5 * table[900:].mean()
        )  # the range falls with t, and so does the step
    assert not any(quantizer.training for quantizer in quantizers.values())
    with (
        torch.no_grad(),
        time.at(t),
    ):  # and what is returned is the mean relative error, by the written formula
        each = [
            float(((q(values[n]) - values[n]) ** 2).mean() / (values[n] ** 2).mean())
            for n, q in quantizers.items()
        ]
    assert after == pytest.approx(sum(each) / 2, rel=1e-4)


@pytest.mark.parametrize("interval", ["temporal", "per_step"])
def test_a_fit_over_time_is_deterministic_and_keyed_by_its_seed(interval):
    one, two, other = (over_time(seed, 10, interval) for seed in (0, 0, 1))
    assert one[0] == two[0] and torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])


def test_minmax_with_tdq_is_deterministic_and_makes_its_file_once(
    shared, tmp_path, tiny_weights, monkeypatch
):
    options = cell("minmax", "temporal")
    one, two = (build(out, tiny_weights, *options) for out in (shared, tmp_path))
    pipeline.run(one), pipeline.run(two)
    assert_same_bits(one, two)
    found = facts(one)["over_time"]
    assert found["after"] > 0 and found["before"] > 0 and found["after"] != found["before"]
    (two.folder / "fit.json").unlink()  # killed after the fit over time, before the end
    monkeypatch.setattr("tdq_exp.fit.ptq.over_time.fit_over_time", None)
    for part in ("baked.safetensors", "intervals.png"):
        (two.folder / part).unlink()
    pipeline.run(build(tmp_path, tiny_weights, *options))
    assert_same_bits(one, two)


def test_minmax_with_tdq_and_dropout_is_deterministic(tmp_path, tiny_weights):
    options = *cell("minmax", "temporal"), "tdq.interval.dropout=0.2"
    runs = [build(tmp_path / name, tiny_weights, *options) for name in ("one", "two")]
    for number, made in enumerate(runs):
        torch.manual_seed(number)  # as in a sweep, whose jobs share one process
        pipeline.run(made)
    assert_same_bits(*runs)


def test_observed_values_keep_the_t_of_their_samples():
    observer = Values()
    t = torch.arange(100.0)
    for number in (1, 0):  # in any order
        observer.batch = number
        observer(t[50 * number : 50 * number + 50].reshape(-1, 1, 1).expand(-1, 3, 4))
    assert torch.equal(observer.all(), t[:, None].expand(-1, observer.all().shape[1]))


def test_observed_quantizers_let_everything_pass_and_quantize_again_afterwards():
    _, _, quantizers, values, t, time = over_time(updates=1)
    x = values["one"]
    with torch.no_grad(), time.at(t):
        quantized = quantizers["one"](x)
        with observed(quantizers) as observers:
            assert quantizers["one"](x) is x
        assert observers["one"].all().shape == (len(t), 256)
        assert torch.isin(observers["one"].all(), x).all()
        with pytest.raises(KeyboardInterrupt), observed(quantizers):
            raise KeyboardInterrupt
        assert torch.equal(quantizers["one"](x), quantized)
