"""Measurements for figures, on cases whose answer is known."""

from __future__ import annotations

import pytest
import torch

from tdq_exp.analysis import activations, alone, quantizers, trajectory
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.fit.quantized import skeleton
from tdq_exp.quant.convert import activation_quantizers, bake
from tdq_exp.quant.layers import QuantLayer

COARSE = "mid_block.resnets.0.conv1.input"


@pytest.fixture(scope="module")
def job():
    choices = ["model=tiny", "model.weights=none", "bits.weight=16", "bits.act=16", "tdq=none"]
    return jobs.build(compose([*choices, "tracker=none"]), source=False)


@pytest.fixture(scope="module")
def float_net(job):
    return job.model.build().eval()


@pytest.fixture(scope="module")
def path(job, float_net):
    return trajectory.float_trajectory(job, float_net, images=2, steps=4)


@pytest.fixture
def net(job, float_net):
    """Return a network of 16 bits with one coarse quantizer: s = 0.25, codes to 0..65535, z = 0."""
    quantized = skeleton(job.model, job.recipe)
    for quantizer in activation_quantizers(quantized).values():
        quantizer.start(100 / 2**15, 2**15)
    for layer in quantized.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer.start(2 / 2**15, 0)

    activation_quantizers(quantized)[f"{COARSE}_quantizer"].start(0.25, 0)
    return bake(quantized)


def test_a_trajectory_is_ascending_and_ends_at_the_noise(job, path):
    assert path.t == sorted(path.t) and len(path.t) == len(path.x) == 4
    assert all(x.shape == (2, *job.model.sample_shape) for x in path.x)


def test_r_and_change_of_curves_that_are_known():
    t = [0, 1, 2, 3]
    line = torch.tensor([1.0, 2.0, 3.0, 4.0])
    bend = torch.tensor([1.0, 2.0, 2.0, 1.0])
    found = activations.relations(
        t, {"a": torch.stack([line, -line], 1), "b": bend[:, None].expand(4, 2)}
    )
    assert found["a"] == {
        "deviation": pytest.approx(1),
        "range": pytest.approx(-1),
        "change": pytest.approx(1.2),
    }
    assert found["b"]["deviation"] == pytest.approx(0, abs=1e-12)
    assert activations.shares(found) == dict.fromkeys(activations.shares(found), 0.5)


def test_holding_x_and_t_leaves_nothing_to_change(job, float_net, path):
    """The same state again and again has the same spread; a real trajectory has not."""
    still = activations.spreads(job, float_net, [(5, path.x[1])] * 3)
    moving = activations.spreads(job, float_net, path)
    assert still.keys() == moving.keys() and len(still) > 5
    assert all(torch.equal(values[0], values[2]) for values in still.values())
    assert any(not torch.equal(values[0], values[-1]) for values in moving.values())


def test_figure_2_has_every_tensor_and_few_boxes(job, float_net):
    found = activations.measure(job, float_net, images=2, steps=4)
    names = list(found["tensors"])  # in the order in which the network runs them
    assert set(names) == set(activations.watched(job.model, float_net))
    assert names[0] == "conv_in" and names[-1] == "conv_out"
    assert set(found["held"]) == {"nothing", "t", "x_t"}

    boxes = found["boxes"]["tensors"]
    assert list(boxes)[0] == names[0] and list(boxes)[-1] == names[-1]
    assert all(row == sorted(row) for rows in boxes.values() for row in rows)


def test_truncation_and_rounding_add_up_to_the_error(job, net, path):
    """A 16-bit quantizer errs by nothing much; the coarse one cuts off everything below 0."""
    errors = {}

    def note(name):
        def keep(module, x, x_hat):
            relative = float((x - x_hat).square().sum() / x.square().sum())
            errors.setdefault(name, []).append(relative)

        return keep

    with trajectory.watching({COARSE: activation_quantizers(net)[f"{COARSE}_quantizer"]}, note):
        found = quantizers.measure(job, net, path)

    coarse = found["quantizers"][COARSE]
    both = [a + b for a, b in zip(coarse["truncation"], coarse["rounding"], strict=True)]
    seen = errors[COARSE][:: len(errors[COARSE]) // len(path.t)]
    assert both == pytest.approx(seen, rel=1e-2)
    assert min(coarse["truncation"]) > 0 and min(coarse["rounding"]) > 0
    assert coarse["grid_low"] == [0.0] * 4
    assert coarse["grid_high"] == pytest.approx([0.25 * 65535] * 4, rel=1e-3)
    assert coarse["bits"] == 16 and coarse["role"] == "conv"

    fine = [q for name, q in found["quantizers"].items() if name != COARSE]
    assert all(max(q["truncation"]) == 0 for q in fine)
    assert max(coarse["sqnr"]) < 20 < 30 < min(min(q["sqnr"]) for q in fine)


def test_the_coarse_quantizer_makes_the_error(job, net):
    found = alone.measure(job, net, images=1, steps=2)
    assert (
        found["shares"].keys()
        == found["errors"].keys()
        == {name.removesuffix("_quantizer") for name in activation_quantizers(net)}
    )
    assert found["shares"][COARSE] > 0.95
    assert found["together"] == pytest.approx(found["errors"][COARSE], rel=0.1)
    assert sum(found["shares"].values()) == pytest.approx(1, rel=1e-3)
    assert all(q.observer is None for q in activation_quantizers(net).values())  # all on again
