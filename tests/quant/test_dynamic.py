"""Dynamic intervals: s and z from the input itself, against a loop over samples."""

from __future__ import annotations

import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.experiment.build import build
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.dynamic import Dynamic, DynamicIntervals
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.nipq import Nipq, NipqWeights
from tdq_exp.quant.rules.pact import Pact, PactWeights
from tests.quant.builders import inputs, make_net, randn


def by_hand(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One tensor on its own range, by torch's observer and quantizer."""
    observer = torch.ao.quantization.MinMaxObserver(
        quant_min=0, quant_max=2**bits - 1, dtype=torch.quint8
    )
    observer(x)
    s, z = observer.calculate_qparams()
    return torch.fake_quantize_per_tensor_affine(x, float(s), int(z), 0, 2**bits - 1)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("training", [True, False])
def test_each_sample_or_the_whole_batch_has_its_own_range(bits, per_sample, training):
    x = randn(4, 3, 6, 6) * torch.tensor([0.01, 1.0, 50.0, 3.0]).reshape(-1, 1, 1, 1) + 0.3
    quantizer = Lsq(Grid(bits, symmetric=False), Dynamic(per_sample)).train(training)
    found = quantizer(x).detach()
    expected = torch.stack([by_hand(v, bits) for v in x]) if per_sample else by_hand(x, bits)
    step = (expected.flatten(1).diff(dim=1).abs().amax(dim=1) / 2**bits).reshape(-1, 1, 1, 1)
    same = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-9
    assert same.float().mean() > 0.999  # the rest lies on the border of two codes
    assert ((found - expected).abs() <= 3 * step + 1e-6).all()


@pytest.mark.parametrize(("weight", "act"), [(Lsq, Lsq), (PactWeights, Pact), (NipqWeights, Nipq)])
def test_gradients_pass_within_the_range_under_every_rule(weight, act):
    quantizer = act(Grid(4, symmetric=False), Dynamic(per_sample=True)).train()
    x = randn(3, 50).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[x.detach().abs() < 1] == 1).all()
    recipe = Recipe(
        4,
        4,
        weight,
        act,
        DynamicIntervals(True),
        weight_interval="max_abs" if weight is PactWeights else "static",
    )
    net = make_net(recipe)
    net(*inputs(2)).sample.square().mean().backward()
    assert all(not list(q.interval.parameters()) for q in activation_quantizers(net).values())


def test_a_baked_network_reads_its_inputs_and_gives_the_same_bits():
    net = make_net(Recipe(4, 4, Lsq, Lsq, DynamicIntervals(True)), few=calibrate.KEPT).eval()
    x, t = inputs(3)
    with torch.no_grad():
        whole = bake(net)(x, t).sample
        assert torch.equal(whole, net(x, t).sample)
        alone = bake(net)(x[:1], t[:1]).sample
    torch.testing.assert_close(whole[:1], alone, rtol=1e-4, atol=1e-4)


def test_reconstruction_of_it_is_refused():
    with pytest.raises(ValueError, match=r"tdq=dynamic: .*use method=minmax"):
        build(compose(["model=tiny", "method=ptq4dm", "fit=ptq", "tdq=dynamic", "bits=w8a8"]))
