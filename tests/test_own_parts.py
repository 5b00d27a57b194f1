"""A user's own interval and rule go through whole runs; nothing of the package knows their names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.metrics.fidelity import METRICS, VALUES, Metric, Value
from tests import own_parts

QUICK = [
    "model=tiny",
    "tracker=none",
    "launcher=cpu",
    "sampler.images=4",
    "fit.validation_samples=4",
]
TRAINED = ["method=lsq", "tdq=none", "protocol.qat.calibration_samples=64", "fit.updates=4"]
FITTED = ["method=ptq4dm", "tdq=none", "bits=w4a3", "calibration.samples=8"]
HARMONIC = [
    f"tdq.interval._target_={own_parts.__name__}.HarmonicIntervals",
    "tdq.label=harmonic",
    "fit.lr_generator=0.1",
]
POWERS = [
    f"{slot}.quantizer._target_={own_parts.__name__}.PowerOfTwo" for slot in ("act", "weight")
]


@pytest.fixture(scope="module", autouse=True)
def _few_start_values(few_start_values_of_a_module):
    """All fits of this file are calibrated alike, so that they can be compared."""


def build(out, weights, *overrides):
    return jobs.build(compose([*QUICK, *overrides, f"out={out}", f"model.weights={weights}"]))


def baked(made):
    """Tables of step sizes of activations, and everything."""
    state = load_file(made.folder / "baked.safetensors")
    return [v for key, v in state.items() if key.endswith("interval.step_sizes")], state


def test_an_interval_of_ones_own_is_reconstructed_and_resumed(tmp_path, tiny_weights):
    whole, part = tmp_path / "whole", tmp_path / "part"
    made = build(whole, tiny_weights, *FITTED, *HARMONIC)
    pipeline.run(made)

    with pytest.raises(InterruptedError, match="stopped after block 3"):
        pipeline.run(build(part, tiny_weights, *FITTED, *HARMONIC, "fit.stop_after=3"))
    resumed = build(part, tiny_weights, *FITTED, *HARMONIC)
    pipeline.run(resumed)

    # Step sizes of blocks that were kept follow t; one of them was read back.
    tables, state = baked(made)
    blocks = json.loads((made.folder / "fit.json").read_text())["facts"]["blocks"]
    moving = [s for s in tables if s.unique().numel() > 100]
    assert len(moving) >= sum(block["kept"] for block in blocks)
    assert any(block["kept"] for block in blocks[:3])

    _, again = baked(resumed)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


def largest_logit(generated):
    return {"largest": float(generated.max()), "classes": generated.shape[1]}


def test_a_rule_of_ones_own_trains_with_it_to_a_row_and_every_baked_step_is_a_power_of_two(
    tmp_path, tiny_weights, monkeypatch
):
    # And a metric: an entry of the registry.
    value = Value("largest", "largest logit", "higher")
    mine = Metric(largest_logit, (value,), least=1, compares=False, reads="logits")
    monkeypatch.setitem(METRICS, "mine", mine)
    monkeypatch.setitem(VALUES, "largest", value)

    own = (*TRAINED, *POWERS, *HARMONIC, "label=powers", "eval.metrics=[fid,mine]")
    made = build(tmp_path, tiny_weights, *own)
    (row,) = pipeline.run(made)
    assert row["images"] == 4 and row["name"] == made.name
    assert row["metrics"].keys() == {"fid", "largest", "classes"}
    assert row["metrics"]["classes"] == 10  # of the logits, and not of the pool

    tables, state = baked(made)
    weights = [v for key, v in state.items() if key.endswith("weight_quantizer.step_size")]
    assert len(weights) == 51 and tables
    for s in [*tables, *weights]:
        mantissa, _ = torch.frexp(s)
        assert (mantissa == 0.5).all()
    assert any(s.unique().numel() > 1 for s in tables)  # and they follow t
