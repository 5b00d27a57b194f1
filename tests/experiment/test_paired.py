"""The paired distance: nothing for equal networks, the formula's number for others."""

import numpy as np
import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import paired
from tdq_exp.experiment.sample_stage import SampledSet


def test_the_numbers_are_those_of_the_formulas():
    theirs = np.full((2, 3, 3, 1), 255, np.uint8)
    assert paired.distances(theirs, theirs) == {"relative_l2": 0.0, "psnr": None}
    found = paired.distances(theirs - 51, theirs)  # 1 -> 0.6 in the range -1..1
    assert found["relative_l2"] == pytest.approx(0.4)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 51))


@pytest.fixture(scope="module")
def job(tiny_weights):
    overrides = ["model=tiny", f"model.weights={tiny_weights}", "sampler.steps=5"]
    return jobs.build(compose([*overrides, "tracker=none"]), source=False)


@pytest.fixture(scope="module")
def float_net(job):
    net = job.model.build()
    job.weights.load(job.model, net)
    return net.eval()


def compared(job, net, engine="fake"):
    device = torch.device("cpu")
    pixels, _ = paired._group(job, net, device)
    images = SampledSet(pixels, 0.0, engine)
    return paired.paired_distance(job, lambda: net, images, device)


def test_the_float_network_is_at_no_distance_from_itself(job, float_net):
    found = compared(job, float_net)
    assert (found["relative_l2"], found["psnr"], found["images"]) == (0.0, None, 4)
    times = [point["t"] for point in found["over_t"]]
    assert len(times) == 4 and times == sorted(times)  # the first of five steps is the noise itself
    assert all(point["relative_l2"] == 0 for point in found["over_t"])


def test_another_network_moves_away_as_t_falls(job, float_net):
    other = job.model.build()
    other.load_state_dict(float_net.state_dict())
    with torch.no_grad():
        other.conv_out.weight.mul_(1.1)
    found = compared(job, other.eval())
    errors = [point["relative_l2"] for point in found["over_t"]]
    assert found["relative_l2"] > 0 and found["psnr"] > 0
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert "over_t" not in compared(job, other, "integer: 3 of 4 layers")


def test_a_float_run_has_none(tiny_weights):
    made = jobs.build(
        compose(["model=tiny", "method=fp", f"model.weights={tiny_weights}"]), source=False
    )
    empty = SampledSet(np.zeros((1, 8, 8, 1), np.uint8), 0.0, "fake")
    assert paired.paired_distance(made, made.model.build, empty, torch.device("cpu")) is None
