"""MinMax against torch's own observers, its laws, and a whole network whose weights are held as codes."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from tdq_exp.quant import calibrate, ops
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake, code_weights, coded_weight
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.dynamic import ChannelRange
from tdq_exp.quant.intervals.static import Static, StaticIntervals
from tdq_exp.quant.kernels import unfused
from tdq_exp.quant.layers import CodedWeight, QuantLayer
from tdq_exp.quant.ops import affine_range
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import ZeroPoint
from tests.oracles import rounding as oracle
from tests.quant.builders import INTERVALS, STEPS, inputs, make_interval, make_net, randn

BITS = (2, 3, 4, 8)
SHAPES = [(9, 3, 3, 3), (9, 6)]
ZERO = 5  # the channel of zeros in `weights`

every_bits = pytest.mark.parametrize("bits", BITS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=["convolution", "linear"])


def weights(shape, seed=0):
    """Channels of every kind: signed, all positive, all negative, constant, zero, tiny, huge, with an outlier."""
    w = randn(*shape, seed=seed)
    w[1] = w[1].abs() + 0.3
    w[2] = -w[2].abs() - 0.3
    w[3], w[4], w[ZERO] = 0.37, -0.21, 0.0
    w[6] *= 1e-3
    w[7] *= 1e3
    w[8].view(-1)[0] = 40.0
    return w


def weight_quantizer(bits):
    grid = Grid(bits, symmetric=False)
    return MinMaxWeights(grid, ChannelRange())


def observed(w, bits):
    """(s, z) of torch's observer, `[out]` each."""
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.quint8,
        qscheme=torch.per_channel_affine,
        quant_min=0,
        quant_max=2**bits - 1,
    )
    observer(w)
    return observer.calculate_qparams()


@every_shape
@every_bits
def test_weights_have_the_step_and_zero_point_of_torchs_observer(bits, shape):
    w = weights(shape)
    s, z = weight_quantizer(bits).parameters_at(w)
    s_torch, z_torch = observed(w, bits)
    assert s.shape == z.shape == (len(w), *[1] * (w.dim() - 1))
    others = torch.arange(len(w)) != ZERO  # torch takes no smaller step than 1e-7 there, we 1e-10
    assert torch.equal(s.flatten()[others], s_torch[others])
    assert torch.equal(z.flatten()[others], z_torch[others].float())
    quantizer = weight_quantizer(bits)
    assert torch.equal(quantizer.interval(w, quantizer.grid)[0], s.flatten())


@every_shape
@every_bits
def test_quantized_weights_are_torchs_but_for_ties(bits, shape):
    w = weights(shape)
    s, z = observed(w, bits)
    expected = torch.fake_quantize_per_channel_affine(w, s, z.int(), 0, 0, 2**bits - 1)
    found = weight_quantizer(bits)(w)
    step = s.reshape(-1, *[1] * (w.dim() - 1))
    tie = ((w / step).frac().abs() - 0.5).abs() < 1e-4
    assert torch.allclose(found[~tie], expected[~tie], rtol=1e-6, atol=1e-12)
    assert ((found - expected).abs() <= 1.001 * step).all()


@every_bits
def test_quantized_weights_are_the_definition_one_number_at_a_time(bits):
    w = weights((9, 7))
    s, z = weight_quantizer(bits).parameters_at(w)
    found = weight_quantizer(bits)(w)
    for out in range(len(w)):
        step, zero = float(s[out]), int(z[out])
        expected = [oracle.fake_quantize(float(x), step, zero, 0, 2**bits - 1) for x in w[out]]
        assert torch.allclose(
            found[out].double(), torch.tensor(expected).double(), rtol=1e-6, atol=0
        ), out


@every_shape
@every_bits
def test_weights_lie_on_their_channels_grid_and_zero_is_exact(bits, shape):
    w = weights(shape)
    w.view(len(w), -1)[:, -1] = 0.0
    s, z = weight_quantizer(bits).parameters_at(w)
    w_hat = weight_quantizer(bits)(w)
    codes = (w_hat / s).round() + z
    assert torch.equal((codes - z) * s, w_hat)
    assert torch.equal(z, z.round())
    for value in (codes, z):  # a zero point on the grid: 0 has a code of its own
        assert value.min() >= 0 and value.max() <= 2**bits - 1
    assert (w_hat.view(len(w), -1)[:, -1] == 0).all()
    assert (w_hat[ZERO] == 0).all()
    half = 0.5 + 1e-4  # the range is the tensor's own: nothing is clipped by more than half a step
    assert ((w_hat - w).abs() <= half * s).all()


@every_shape
@every_bits
def test_what_is_on_the_grid_stays_where_it_is(bits, shape):
    w = weights(shape)
    grid = Grid(bits, symmetric=False)
    once = weight_quantizer(bits)(w)
    s, z = weight_quantizer(bits).parameters_at(w)
    assert torch.equal(ops.fake_quantize(once, s, z, grid.n, grid.p), once)
    twice = weight_quantizer(bits)(
        once
    )  # with the range of the quantized weights: the same, but for a last bit
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)


@every_bits
def test_constant_channels_are_kept_whatever_the_bits(bits):
    for value in (0.37, -0.21, 3e4, 0.0):
        w = torch.full((2, 5), value)
        assert torch.allclose(weight_quantizer(bits)(w), w, rtol=1e-6, atol=0)


@every_bits
def test_fused_and_unfused_weights_are_the_same_bits(bits):
    w = weights((9, 3, 3, 3))
    fused = weight_quantizer(bits)(w)
    with unfused():
        assert torch.equal(weight_quantizer(bits)(w), fused)


@pytest.mark.parametrize("training", [True, False])
@every_shape
def test_all_of_a_weights_gradient_passes_straight_through(shape, training):
    w = weights(shape).requires_grad_()
    g = randn(*shape, seed=1)
    (weight_quantizer(3).train(training)(w) * g).sum().backward()
    assert torch.equal(w.grad, g)


def test_weights_have_nothing_to_learn_and_follow_the_tensor():
    quantizer = weight_quantizer(4)
    assert list(quantizer.parameters()) == []
    w = weights((9, 6))
    quantizer.start(123.0, 7)  # there is nothing to set
    assert torch.equal(quantizer(2 * w), 2 * quantizer(w))


TENSORS = {
    "signed": lambda: randn(4, 6, 5, 5),
    "positive": lambda: randn(4, 6, 5, 5).abs() + 0.5,
    "negative": lambda: -randn(4, 6, 5, 5).abs() - 0.5,
    "skewed": lambda: torch.nn.functional.silu(3 * randn(4, 6, 5, 5)),
    "constant": lambda: torch.full((4, 6), 0.8),
    "small": lambda: 1e-3 * randn(4, 6),
}


def calibrated(grid, tensors):
    """An activation quantizer that has been shown some tensors."""
    quantizer = MinMax(grid, Static(), ZeroPoint(grid)).eval()
    with calibrate.calibrating(nn.ModuleList([quantizer]), len(tensors)) as calibration:
        for number, x in enumerate(tensors):
            calibration.batch = number
            assert quantizer(x) is x
    return quantizer


@pytest.mark.parametrize("kind", TENSORS)
@every_bits
def test_activations_have_the_step_and_zero_point_of_torchs_observer(bits, kind):
    x = TENSORS[kind]()
    tensors = [0.5 * x, x, 0.7 * x]  # the range is that of all batches together
    observer = MinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1
    )
    for tensor in tensors:
        observer(tensor)
    s_torch, z_torch = observer.calculate_qparams()
    quantizer = calibrated(Grid(bits, symmetric=False), tensors)
    s, z = quantizer.tables()
    assert float(s) == pytest.approx(float(s_torch), rel=2e-6)  # softplus and back
    assert int(z) == int(z_torch)
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(s_torch), int(z_torch), 0, 2**bits - 1
    )
    with torch.no_grad():
        found = quantizer(x)
    tie = ((x / s).frac().abs() - 0.5).abs() < 1e-3
    assert torch.allclose(found[~tie], expected[~tie], rtol=1e-5, atol=1e-9)
    assert ((found - x).abs() <= 0.501 * s).all()  # nothing is truncated
    assert float(quantizer(torch.zeros(1)).detach()) == 0.0


@pytest.mark.parametrize("kind", ["signed", "positive", "negative", "skewed"])
@every_bits
def test_a_symmetric_grid_reaches_the_largest_value_that_was_seen(bits, kind):
    x = TENSORS[kind]()
    grid = Grid(bits, symmetric=True)  # the release's activations
    quantizer = MinMax(grid, Static()).eval()
    with calibrate.calibrating(nn.ModuleList([quantizer]), 1):
        quantizer(x)
    with torch.no_grad():
        s = float(quantizer.tables()[0])
        assert s == pytest.approx(float(x.abs().max()) / grid.p, rel=1e-5)
        assert float((quantizer(x) - x).abs().max()) <= 0.501 * s


@every_bits
def test_an_input_that_is_always_zero_stays_zero(bits):
    quantizer = calibrated(Grid(bits, symmetric=False), [torch.zeros(3, 4)])
    assert torch.equal(quantizer(torch.zeros(3, 4)).detach(), torch.zeros(3, 4))


@every_bits
def test_a_range_is_widened_to_hold_zero(bits):
    grid = Grid(bits, symmetric=False)
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 2.0, -1.0, 0.0])
    s, z = affine_range(low, high, grid.n, grid.p)
    assert s.tolist() == pytest.approx([3 / grid.p, 2 / grid.p, 3 / grid.p, 1e-10])
    assert z.tolist() == [round(grid.p / 3), 0, grid.p, 0]


@pytest.mark.parametrize("interval", INTERVALS)
def test_the_range_is_the_start_only_where_the_step_is_static(interval):
    grid = Grid(4, symmetric=False)
    source, _ = make_interval(interval, TimeContext(STEPS))
    quantizer = MinMax(grid, source, ZeroPoint(grid))
    assert quantizer.start_by == ("range" if interval == "static" else "error")


def small_net(bits):
    recipe = Recipe(
        bits, 4, MinMaxWeights, MinMax, StaticIntervals(), weight_interval="channel_range"
    )
    return make_net(recipe)


def layers(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantLayer)}


@every_bits
def test_codes_times_step_are_what_every_layer_of_a_network_sees_bit_for_bit(bits):
    net = small_net(bits)
    seen = {
        name: layer.weight_quantizer(layer.layer.weight).detach()
        for name, layer in layers(net).items()
    }
    with torch.no_grad():
        before = net(*inputs(3), return_dict=False)[0]
    floats = {name: layer.layer.weight.clone() for name, layer in layers(net).items()}
    code_weights(net)
    assert len(layers(net)) > 20
    for name, layer in layers(net).items():
        coded = layer.weight_quantizer
        assert isinstance(coded, CodedWeight)
        assert coded.codes.dtype == (torch.uint8 if bits == 8 else torch.int8)
        assert int(coded.codes.min()) >= 0 and int(coded.codes.max()) <= 2**bits - 1
        assert torch.equal(
            (coded.codes.float() - coded.zero_point) * coded.step_size, seen[name]
        ), name
        assert torch.equal(coded(), seen[name]), name
        s, z = observed(floats[name], bits)
        assert torch.equal(coded.step_size.flatten(), s), name
        assert torch.equal(coded.zero_point.flatten(), z.float()), name
    with torch.no_grad():
        assert torch.equal(net(*inputs(3), return_dict=False)[0], before)


@every_bits
def test_a_baked_network_gives_the_same_bits_and_loads_strictly(bits):
    net = small_net(bits)
    with torch.no_grad():
        before = net(*inputs(3), return_dict=False)[0]
        baked = bake(net)
        assert torch.equal(baked(*inputs(3), return_dict=False)[0], before)
        other = copy.deepcopy(baked)
        for module in other.modules():
            if isinstance(module, CodedWeight):
                module.codes.zero_(), module.zero_point.zero_(), module.step_size.fill_(1.0)
        other.load_state_dict(baked.state_dict(), strict=True)
        assert torch.equal(other(*inputs(3), return_dict=False)[0], before)
    assert not any(name.endswith("layer.weight") for name in baked.state_dict())


def test_coding_twice_changes_nothing():
    net = small_net(4)
    code_weights(net)
    before = {name: id(layer.weight_quantizer) for name, layer in layers(net).items()}
    code_weights(net)
    assert before == {name: id(layer.weight_quantizer) for name, layer in layers(net).items()}


def test_coded_weights_do_not_share_memory_with_what_they_were_made_from():
    s, z = torch.full((2, 1), 0.5), torch.full((2, 1), 3.0)
    coded = coded_weight(torch.tensor([[0.0, 15.0], [7.0, 3.0]]), s, z, 0, 15)
    s.zero_(), z.zero_()
    assert coded().tolist() == [[-1.5, 6.0], [2.0, 0.0]]


def test_a_symmetric_grid_stores_no_zero_point():
    coded = coded_weight(torch.tensor([[-7.0, 7.0]]), torch.tensor(0.5), torch.zeros(()), -7, 7)
    assert coded.zero_point is None
    assert "zero_point" not in coded.state_dict()
    assert coded().tolist() == [[-3.5, 3.5]]


@pytest.mark.parametrize("what", ["codes", "step_size", "zero_point"])
def test_loading_other_numbers_into_a_coded_weight_changes_what_it_gives(what):
    coded = coded_weight(
        torch.tensor([[0.0, 15.0]]), torch.full((1, 1), 0.5), torch.full((1, 1), 3.0), 0, 15
    )
    before = coded().clone()  # computed, and kept
    state = coded.state_dict()
    coded.load_state_dict({**state, what: state[what] + 1})
    assert not torch.equal(coded(), before)
    assert torch.equal(coded(), (coded.codes - coded.zero_point) * coded.step_size)


def test_every_activation_of_a_network_starts_at_the_range_that_it_saw_in_float():
    recipe = Recipe(4, 4, MinMaxWeights, MinMax, StaticIntervals(), weight_interval="channel_range")
    net = make_net(recipe, calibrated=False)
    x, t = inputs(8)
    seen = {}
    everything = {
        name: module for name, module in net.named_modules() if isinstance(module, Quantizer)
    }
    for name, quantizer in everything.items():
        quantizer.observer = lambda value, name=name: seen.update(
            {name: (float(value.min()), float(value.max()))}
        )
    with torch.no_grad():
        net(x, t)
        for quantizer in everything.values():
            quantizer.observer = None
        with calibrate.calibrating(net, 1):
            net(x, t)
    assert len(activation_quantizers(net)) > 40
    for name, quantizer in activation_quantizers(net).items():
        low, high = min(seen[name][0], 0.0), max(seen[name][1], 0.0)
        s, z = (float(value) for value in quantizer.tables())
        assert s == pytest.approx((high - low) / 15, rel=2e-6), name
        assert z == pytest.approx(-15 * low / (high - low), abs=0.501), name
