"""What the first layer sees of the starting noise, against the layer itself."""

from __future__ import annotations

import pytest
import torch

from tdq_exp.experiment.first_layer import first_range, noise_beyond
from tdq_exp.models.unet_roles import unet_roles
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.intervals.dynamic import DynamicIntervals
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.rules.lsq import Lsq
from tests.quant.builders import load_model, make_net

ROLES = unet_roles(load_model("tiny").build())
TEMPORAL = TemporalIntervals(encoding=16, width=8)


@pytest.mark.parametrize("intervals", [StaticIntervals(), TEMPORAL])
@pytest.mark.parametrize("form", [lambda net: net.eval(), bake])
def test_the_range_is_what_the_quantizer_passes_at_that_time_step(intervals, form):
    net = form(make_net(Recipe(4, 4, Lsq, Lsq, intervals)))
    for t in (0, 500, 999):
        with torch.no_grad(), net.time.at(torch.tensor(t)):
            passed = [
                float(net.conv_in.input_quantizer(torch.full((1, 1, 1, 1), end)))
                for end in (-1e4, 1e4)
            ]
        assert first_range(net, ROLES, t) == pytest.approx(passed)
        assert passed[0] < -0.1 and passed[1] > 0.1


def test_a_float_first_layer_and_one_that_follows_its_input_have_none():
    kept = make_net(Recipe(4, 4, Lsq, Lsq, plan=Plan(keep_float=["first"])))
    assert first_range(kept, ROLES, 0) is None
    assert first_range(make_net(Recipe(4, 4, Lsq, Lsq, DynamicIntervals(True))), ROLES, 0) is None


@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-2.48, 2.17), (-1e9, 0.0), (-10.0, 10.0)])
def test_the_share_is_that_of_drawn_noise(low, high):
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert noise_beyond(low, high) == pytest.approx(
        float(((x < low) | (x > high)).float().mean()), abs=1e-3
    )


def test_a_model_without_such_a_layer_has_none():
    others = {name: role for name, role in ROLES.items() if role.kind != "first"}
    assert first_range(make_net(Recipe(4, 4, Lsq, Lsq)), others, 0) is None
