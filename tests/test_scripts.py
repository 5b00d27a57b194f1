"""Scripts that measure: what they report, on a case whose answer is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment import build as jobs
from tdq_exp.fit.quantized import skeleton
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.layers import QuantLayer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("limit", "beyond"), [(1.0, True), (1e5, False)])
def test_clipped_noise_tells_places_beyond_the_first_range_from_all_others(limit, beyond):
    """All is at 16 bits but for the first layer's input: there -1..1, which cuts, or codes 3 apart, which blur all places."""
    module = script("clipped_noise")
    overrides = ["bits.weight=16", "bits.act=16", "tdq=none", "sampler.steps=5", "tracker=none", "label=wide"]
    made = jobs.build(compose(["model=tiny", "model.weights=none", *overrides]), source=False)
    net, float_net = skeleton(made.model, made.recipe), made.model.build().eval()
    for quantizer in activation_quantizers(net).values():
        quantizer.start(100 / 2**15, 2**15)
    for layer in net.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer.start(2 / 2**15, 0)
    first = net.conv_in.input_quantizer
    first.start(limit / 2**15, 2**15)
    with torch.no_grad():
        low, high = (float(first(torch.tensor([[end]]))) for end in (-1e9, 1e9))
    assert high == pytest.approx(limit, rel=1e-3) and low == pytest.approx(-limit, rel=1e-3)
    x_t = starting_noise(image_generators(0, range(8)), made.model.sample_shape)
    as_it_is, freed = module.analyse(made, net, x_t, module.drawn(made, float_net, x_t))
    outside = [not low <= float(value) <= high for value in x_t.flatten()]  # one channel: an element is a place
    counted = sum(outside) / len(outside)
    assert as_it_is["share"] == freed["share"] == pytest.approx(counted, abs=1e-3)
    assert freed["range"] == "float" and 3 * freed["error_elsewhere"] < as_it_is["error_elsewhere"]
    if beyond:
        assert 0.2 < counted < 0.5
        assert as_it_is["error_there"] > max(as_it_is["error_elsewhere"], 3 * freed["error_there"])
    else:
        assert counted == 0 and as_it_is["error_there"] is None
