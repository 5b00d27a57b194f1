"""Integer layers against simulated quantization, layer by layer and as a whole."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from tdq_exp.deploy import choose, coders, integer, products
from tdq_exp.models.resnet_blocks import unet_chains
from tdq_exp.quant import calibrate, ops
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Intervals, LookupTable
from tdq_exp.quant.intervals.dynamic import Dynamic, DynamicIntervals
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.kernels import unfused
from tdq_exp.quant.layers import CodedWeight, QuantConv2d, QuantLayer, QuantLinear
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.release import ReleaseDetails
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.quant.rules.pact import DorefaWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import TableZeroPoint
from tdq_exp.runtime import files
from tests.oracles.products import ExactProduct
from tests.quant.builders import inputs, load_model, make_net, randn

HERE = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    integer.unavailable(HERE) is not None, reason=str(integer.unavailable(HERE))
)

RELEASE = ReleaseDetails(
    reduced_grids=True, symmetric_activations=True, raw_step=True, start="moments", he=False
)
FLOATS = ("first", "last", "time_embedding", "time_projection")


def temporal():
    return TemporalIntervals(encoding=16, width=8)


RECIPES = {
    "lsq_tdq": lambda bits: Recipe(bits, bits, Lsq, Lsq, temporal()),
    "lsq_edge8": lambda bits: Recipe(
        bits, bits, Lsq, Lsq, StaticIntervals(), plan=Plan(edge_bits=8)
    ),
    "lsq_release": lambda bits: Recipe(
        bits,
        bits,
        Lsq,
        Lsq,
        temporal(),
        plan=Plan(keep_float=FLOATS, attention=False),
        habits=RELEASE,
    ),
    "ptq_tdq": lambda bits: Recipe(
        bits, bits, MinMaxWeights, Lsq, temporal(), weight_interval="channel_range"
    ),
    "minmax": lambda bits: Recipe(
        bits, bits, MinMaxWeights, MinMax, weight_interval="channel_range"
    ),
    "lsq_dynamic": lambda bits: Recipe(bits, bits, Lsq, Lsq, DynamicIntervals(per_sample=True)),
    "ptq_dynamic": lambda bits: Recipe(
        bits,
        bits,
        MinMaxWeights,
        MinMax,
        DynamicIntervals(per_sample=True),
        weight_interval="channel_range",
    ),
    "lsq_dynamic_tensor": lambda bits: Recipe(
        bits, bits, Lsq, Lsq, DynamicIntervals(per_sample=False)
    ),
}


def answers(net: nn.Module, t: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of every quantized layer at one time step."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name, module in net.named_modules()
        if isinstance(module, QuantLayer)
    ]
    with torch.no_grad():
        net(inputs(3)[0], torch.tensor(t))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_every_layer_gives_what_the_simulated_one_gives(name, bits, monkeypatch):
    wide = bits == 8 or "edge8" in name
    if (
        wide and not products.all_are_exact_here()
    ):  # 8 by 8 bits: by exact products, to test all but the kernels
        monkeypatch.setattr(products, "all_are_exact_here", lambda: True)
        monkeypatch.setattr(integer, "Product", ExactProduct)
    net = bake(make_net(RECIPES[name](bits)))
    layers = integer.candidates(net)
    assert layers.keys() == {
        n for n, module in net.named_modules() if isinstance(module, QuantLayer)
    }
    for t in (0, 17, 500, 999):
        for layer, (x, y) in answers(net, t).items():
            made = layers[layer]
            if (
                made.coder is None
            ):  # q, k and v: x is quantized already, and its codes are those of x itself
                reader = net.get_submodule(layer.rpartition(".")[0]).processor.input_quantizer
                x = coders.coder_of(reader)(x)
            found = made(x)
            assert found.shape == y.shape
            assert float((found - y).abs().max()) <= 2e-6 * float(y.abs().max()), (layer, t)


@pytest.mark.parametrize("name", ["lsq_tdq", "ptq_tdq"])
def test_a_whole_network_follows_the_simulated_one(name):
    """One pass at 3 bits, where no sum of this net lies on the border of two codes: later layers see the same codes."""
    net = bake(make_net(RECIPES[name](3)))
    whole = integer.integerize(net, unet_chains(net))
    assert not any(isinstance(module, QuantLayer) for module in whole.modules())
    x = inputs(3)[0]
    for t in (3, 700):
        with torch.no_grad():
            simulated, found = net(x, torch.tensor(t)).sample, whole(x, torch.tensor(t)).sample
        torch.testing.assert_close(found, simulated, rtol=1e-4, atol=1e-5)
    assert any(
        isinstance(module, QuantLayer) for module in net.modules()
    )  # a copy: the net is as it was


def test_an_attention_without_a_norm_runs_on_codes_too():
    """The middle one of a network with scale and shift, unless `attn_norm_num_groups` is set."""
    options = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}
    source = load_model("tiny", **options).build().eval()
    assert source.mid_block.attentions[0].group_norm is None
    net = bake(make_net(RECIPES["lsq_edge8"](8), few=calibrate.KEPT, **options))
    whole = integer.integerize(net, unet_chains(net))
    x, t = inputs(3)[0], torch.tensor(300)
    with torch.no_grad():
        expected, simulated, found = (n(x, t).sample for n in (source, net, whole))
    assert float((simulated - expected).norm() / expected.norm()) < 0.1
    assert float((found - simulated).norm() / simulated.norm()) < 0.1


@pytest.mark.parametrize("zero", [0, 3, 15])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"groups": 3}]
)
def test_zero_points_under_padding_stride_dilation_and_groups(zero, options):
    time = TimeContext(10)
    quantizer = Lsq(
        Grid(4, symmetric=False),
        LookupTable(torch.tensor([0.1]), time),
        TableZeroPoint(torch.tensor([float(zero)]), time),
    )
    conv = nn.Conv2d(6, 9, 3, **{"padding": 1, **options})
    codes = torch.randint(-7, 8, conv.weight.shape, generator=torch.Generator().manual_seed(1)).to(
        torch.int8
    )
    layer = QuantConv2d(conv, CodedWeight(codes, torch.tensor(0.05)), quantizer.eval())
    x = randn(2, 6, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            integer.IntegerLayer(layer, coders.coder_of(quantizer))(x),
            layer(x),
            rtol=2e-6,
            atol=2e-6,
        )


def test_affine_codes_fit_into_signed_bytes_and_only_wide_ones_need_a_second_sum():
    generator = torch.Generator().manual_seed(0)
    for bits, needed in ((4, False), (7, False), (8, True)):
        codes = torch.randint(0, 2**bits, (5, 40), generator=generator).to(torch.uint8)
        codes[:, 0], codes[:, 1] = 0, 2**bits - 1
        zero = torch.randint(0, 2**bits, (5, 1), generator=generator).float()
        signed, rest = integer.signed_codes(CodedWeight(codes, torch.full((5, 1), 0.1), zero))
        assert signed.dtype == torch.int8
        assert torch.equal(signed.float() + rest[:, None], codes.float() - zero)
        assert bool(rest.any()) == needed


@pytest.mark.parametrize("fused", [True, False])
def test_codes_are_the_quantizers_own(fused):
    x = torch.cat([randn(500) * 3, torch.tensor([1e30, -1e30, 0.25, 0.75, float("nan")])]).reshape(
        1, -1
    )
    expected = ((x / 0.5).clamp(-3, 12).round() + 3).nan_to_num(0)
    with nullcontext() if fused else unfused():
        found, numbers = kernels.codes(x, torch.tensor([0.5]), torch.tensor([3.0]), 0, 15)
        _, of_numbers = kernels.codes(x[:, :-1], torch.tensor([0.5]), torch.tensor([3.0]), 0, 15)
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), expected)
    assert of_numbers and not numbers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name", ["lsq_tdq", "ptq_tdq", "minmax", "ptq_dynamic", "lsq_dynamic_tensor"]
)
def test_what_is_no_number_comes_out_as_none(name, fused):
    """Bytes have no NaN: without a sign of it a network that has diverged gives images."""
    baked = bake(make_net(RECIPES[name](4)))
    net = integer.integerize(baked, unet_chains(baked))
    x, _ = inputs(2)
    with torch.no_grad(), nullcontext() if fused else unfused():
        assert bool(net(x, 500, return_dict=False)[0].isfinite().all())
        x[1, 0, 3, 3] = float("nan")
        assert bool(net(x, 500, return_dict=False)[0][1].isnan().all())

        # An infinity within the network, of which a norm makes NaN.
        x, _ = inputs(2)
        with planted(net.mid_block.resnets[0]):
            assert bool(net(x, 500, return_dict=False)[0][1].isnan().all())


@contextmanager
def planted(block):
    """Put an infinity into what a block reads."""

    def plant(block, args):
        args[0][1, 0, 0, 0] = torch.inf

    hook = block.register_forward_pre_hook(plant)
    yield
    hook.remove()


def test_weights_that_are_no_integers_and_wide_codes_stay_simulated():
    wide = bake(make_net(Recipe(12, 4, Lsq, Lsq)))
    assert integer.candidates(wide) == {}
    assert integer.candidates(bake(make_net(Recipe(4, 9, Lsq, Lsq)))) == {}
    dorefa = bake(make_net(Recipe(4, 4, DorefaWeights, Lsq, weight_interval="max_abs")))
    assert integer.candidates(dorefa) == {}
    layer = next(module for module in wide.modules() if isinstance(module, QuantLinear))
    assert integer.reason_against(layer) == "its weights are wider than 8 bits"


def test_what_can_not_run_on_codes_is_refused_by_name():
    net = bake(make_net(RECIPES["lsq_tdq"](4)))
    with pytest.raises(ValueError, match="conv_norm_out: can't run on codes"):
        integer.integerize(net, unet_chains(net), ["conv_norm_out"])
    name = next(name for name in integer.candidates(net) if name.endswith("to_q"))
    with pytest.raises(ValueError, match="q, k and v"):
        integer.integerize(net, unet_chains(net), [name])
    with pytest.raises(ValueError, match="one time step for the whole batch"):
        integer.integerize(net, unet_chains(net))(*inputs(2))


def test_the_choice_is_measured_once_and_kept(tmp_path):
    net, model = bake(make_net(RECIPES["lsq_tdq"](4))), load_model("tiny")
    x = inputs(2)[0]

    def run(other):
        return model.predict(other, x, torch.tensor(500))

    every = choose.choice(net, run, 0.0, choose.Kept(tmp_path / "all.json"))
    assert set(every["layers"]) == integer.candidates(net).keys() and every["of"] == len(
        every["layers"]
    )
    assert choose.choice(net, run, 1e9, choose.Kept(tmp_path / "none.json"))["layers"] == []
    kept = files.read_json(tmp_path / "all.json")
    assert (
        choose.choice(net, run, 1e9, choose.Kept(tmp_path / "all.json")) == kept
    )  # the file is what counts
    times = choose.timed(net, run)
    assert sum(len(entry.names) for entry in times) == len(every["layers"])
    assert all(entry.simulated > 0 and entry.integer > 0 for entry in times)


def test_another_device_or_cpu_says_why():
    assert "kernels for meta here" in str(integer.unavailable(torch.device("meta")))
    if not torch.cuda.is_available():
        assert "kernels for cuda here" in str(integer.unavailable(torch.device("cuda")))


class OwnRange(Dynamic):
    """A range of the input by a formula of its own: half of it."""

    def __init__(self):
        super().__init__(per_sample=True)
        self.range_per_sample = None

    def forward(self, x, grid):
        return ops.affine_range(*(bound / 2 for bound in x.aminmax()), grid.n, grid.p)


class OwnRanges(Intervals):
    dynamic = True

    def make(self, names, time, raw=False):
        return [OwnRange() for _ in names], None


def test_layers_whose_range_no_coder_knows_stay_simulated_and_say_so():
    net = bake(make_net(Recipe(4, 4, Lsq, Lsq, OwnRanges()), calibrated=False))
    assert integer.codable(net) == {} and integer.candidates(net) == {}
    reasons = integer.left_out(net)
    assert "its step size is read from the input by a rule of its own" in reasons.values()
    assert reasons.keys() == {n for n, m in net.named_modules() if isinstance(m, QuantLayer)}
