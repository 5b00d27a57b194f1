"""Quantizing a network, and baking it: which layers, which quantizers, and the same numbers before and after."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from tdq_exp.config.compose import compose
from tdq_exp.models.attention import AttentionProcessor, quantize_attention
from tdq_exp.models.unet_roles import unet_roles
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake, layer_map, quantize
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import LookupTable
from tdq_exp.quant.intervals.static import Static
from tdq_exp.quant.intervals.temporal import GeneratorBank
from tdq_exp.quant.layers import (
    CodedWeight,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    smallest_integer_type,
)
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import ReleaseDetails
from tdq_exp.quant.roles import Role
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.nipq import Nipq
from tdq_exp.quant.rules.pact import DorefaWeights
from tdq_exp.quant.zero_point import LowerBound, TableZeroPoint, ZeroPoint
from tests.quant.builders import (
    INTERVALS,
    inputs,
    load_model,
    make_net,
    make_recipe,
    randn,
    start_quickly,
    stir,
)

RELEASE = {"keep_float": ["first", "last", "time_embedding", "time_projection"], "attention": False}
METHODS = ("lsq", "pact", "nipq")
PARTS = ("input", "q", "k", "v", "probabilities")
RELEASE_HABITS = ReleaseDetails(
    reduced_grids=True,
    symmetric_activations=True,
    raw_step=True,
    scale_activation_gradient=False,
    start="moments",
)


def started(rule="lsq", interval="static", bits=4, **options):
    """A quantized network, started without calibration and moved a little, in eval mode."""
    net = make_net(make_recipe(rule, interval, bits, **options), calibrated=False)
    start_quickly(net)
    for module in net.modules():
        if isinstance(module, Quantizer | GeneratorBank):
            stir(module, 0.02)
    return net.eval()


def leaves(net):
    return {name for name, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d | nn.Linear)}


# --- Roles


@pytest.mark.parametrize("name", ["tiny", "digits", "ddim_small", "ddim_cifar10"])
def test_roles_cover_all_leaves(name):
    model = load_model(name)
    net = model.build()
    roles = model.roles(net)
    assert roles.keys() == leaves(net)
    kinds = [role.kind for role in roles.values()]
    assert kinds.count("first") == kinds.count("last") == 1
    assert kinds.count("time_embedding") == 2
    assert roles["conv_in"].kind == "first" and roles["conv_out"].kind == "last"
    for role_name, role in roles.items():
        assert (role.reads is not None) == (role.kind == "attention_qkv"), role_name


def test_inputs_said_to_come_out_of_a_silu_do():
    model = load_model("tiny")
    net = model.build().eval()
    lowest, roles = {}, model.roles(net)
    for name in roles:
        net.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: lowest.update({name: float(args[0].min())})
        )
    with torch.no_grad():
        net(100 * inputs(8)[0], inputs(8)[1])  # large, so that what isn't bounded is seen
    for name, role in roles.items():
        assert (lowest[name] >= -0.2785) == role.after_silu, name


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_roles_that_do_not_fit_the_network_are_an_error(damage):
    model = load_model("tiny")
    net = model.build()
    roles = model.roles(net)
    if damage == "missing":
        del roles["mid_block.attentions.0.to_q"]
    else:
        roles["no.such.layer"] = Role("conv", "no.such")
    with pytest.raises(
        ValueError, match="mid_block.attentions.0.to_q" if damage == "missing" else "no.such.layer"
    ):
        quantize(net, roles, make_recipe(), 1000, quantize_attention)


def test_an_unknown_layer_has_no_role():
    with pytest.raises(ValueError, match="strange"):
        unet_roles(nn.ModuleDict({"strange": nn.Linear(2, 2)}))


def test_unknown_kinds_are_errors_that_name_the_key():
    with pytest.raises(ValueError, match="role 'edge'"):
        Role("edge", "block")
    with pytest.raises(ValueError, match=r"plan\.plan\.keep_float.*'frist'"):
        Plan(keep_float=["first", "frist"])


# --- Plans


@pytest.mark.parametrize(("plan", "count"), [({}, 113), ({"edge_bits": 8}, 113), (RELEASE, 87)])
def test_quantized_layers_of_the_cifar10_network(plan, count):
    model = load_model("ddim_cifar10")
    net = model.build()
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    roles = model.roles(net)
    quantize(net, roles, make_recipe(plan=Plan(**plan)), 1000, quantize_attention)
    layers = [module for module in net.modules() if isinstance(module, QuantLayer)]
    assert len(layers) == count
    assert len(roles) == 113
    rows = layer_map(net, roles)
    assert sum(row["weight"] not in ("float", "-") for row in rows) == count
    attention = [
        row
        for row in rows
        if row["role"] == "attention_matrix" and row["layer"].endswith((".q", ".k", ".v"))
    ]
    # Two blocks down, three up and the middle one have attention.
    assert len(attention) == 3 * 6
    assert all((row["input"] == "float") == (plan == RELEASE) for row in attention)

    # What q, k and v read has a quantizer in either plan, and is no matrix of attention's.
    shared = [row for row in rows if row["role"] == "attention_input"]
    assert len(shared) == 6 and all(row["layer"].endswith(".input") for row in shared)
    assert not [row for row in shared if row["input"] == "float"]


def test_plan_all_leaves_no_layer_and_no_attention_matrix_in_float():
    net = started()
    assert all(name.endswith(".layer") for name in leaves(net))
    names = activation_quantizers(net).keys()
    for part in PARTS:
        holder = "input_quantizer" if part == "input" else part
        assert f"mid_block.attentions.0.processor.{holder}" in names


def test_plan_edge8_gives_eight_bits_to_the_edges_alone():
    net = started(plan=Plan(edge_bits=8))
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer):
            bits = 8 if name in ("conv_in", "conv_out") else 4
            assert module.weight_quantizer.grid.bits == bits, name
            if module.input_quantizer is not None:
                assert module.input_quantizer.grid.bits == bits, name


def test_plan_release_shortcut8_gives_eight_bits_to_the_shortcuts_alone():
    plans = [
        compose(["model=tiny", f"plan=release{name}"]).plan.plan for name in ("", "_shortcut8")
    ]
    assert dict(plans[1]) == {**plans[0], "shortcut_bits": 8}
    net = started(plan=instantiate(plans[1]))
    layers = {n: m for n, m in net.named_modules() if isinstance(m, QuantLayer)}
    for name, layer in layers.items():
        bits = 8 if name.endswith("conv_shortcut") else 4
        assert layer.weight_quantizer.grid.bits == bits, name
        if layer.input_quantizer is not None:
            assert layer.input_quantizer.grid.bits == bits, name
    assert any(name.endswith("conv_shortcut") for name in layers)


def test_plan_release_keeps_what_it_says_in_float():
    net = started(plan=Plan(**RELEASE))
    kinds = {role.kind for name, role in unet_roles(load_model("tiny").build()).items()
             if not isinstance(net.get_submodule(name), QuantLayer)}  # fmt: skip
    assert kinds == set(RELEASE["keep_float"])
    processor = net.mid_block.attentions[0].processor
    assert processor.input_quantizer is not None
    assert processor.q is processor.k is processor.v is processor.probabilities is None


def test_weight_and_activation_bits_are_not_swapped():
    recipe = Recipe(8, 3, Lsq, Lsq)
    net = make_net(recipe, calibrated=False)
    for name, module in net.named_modules():
        if isinstance(module, Quantizer):
            assert module.grid.bits == (8 if name.endswith("weight_quantizer") else 3), name


# --- q, k and v


def test_q_k_and_v_share_one_input_quantizer():
    net = started()
    for name, module in net.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            assert isinstance(module, QuantLinear)
            assert module.input_quantizer is None
    calls, seen = [], []
    attention = net.mid_block.attentions[0]
    attention.processor.input_quantizer.register_forward_hook(
        lambda q, args, out: calls.append(out)
    )
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        net(*inputs())
    assert len(calls) == 1
    assert len(seen) == 3 and all(x is calls[0] for x in seen)


def test_quantizers_of_attention_are_where_they_belong():
    # Each replaces what passes by a constant of its own; the output shows whether all of them were asked.
    net = started()
    attention = net.mid_block.attentions[0]
    shapes = {}
    for part in ("q", "k", "v", "probabilities"):
        getattr(attention.processor, part).register_forward_pre_hook(
            lambda module, args, part=part: shapes.update({part: (tuple(args[0].shape), args[0])})
        )
    with torch.no_grad():
        net(*inputs(2))
    heads, tokens = attention.heads, 16
    width = 16 // heads
    for part in ("q", "k", "v"):
        assert shapes[part][0] == (2, heads, tokens, width)
    assert shapes["probabilities"][0] == (2, heads, tokens, tokens)
    rows = shapes["probabilities"][1].sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    assert not torch.equal(shapes["q"][1], shapes["k"][1])


@pytest.mark.parametrize("head_dim", [None, 8, 4])
@pytest.mark.parametrize("block", ["mid_block.attentions.0", "down_blocks.1.attentions.0"])
def test_attention_without_quantizers_equals_diffusers_own(head_dim, block):
    model = load_model("tiny")
    model.network["attention_head_dim"] = head_dim
    net = model.build().eval()
    attention = net.get_submodule(block)
    attention.rescale_output_factor = 2**0.5
    x = randn(3, 16, 4, 4)
    with torch.no_grad():
        expected = attention(x)
        attention.set_processor(AttentionProcessor(None))
        found = attention(x)
    assert float((expected - x).abs().max()) > 0.1  # it does something
    assert float((found - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("head_dim", [None, 4])
def test_finely_quantized_attention_is_close_to_diffusers_own(head_dim):
    model = load_model("tiny")
    model.network["attention_head_dim"] = head_dim
    net = model.build().eval()
    attention = net.mid_block.attentions[0]
    x = randn(3, 16, 4, 4)

    def fine(s, share):
        grid = Grid(16, symmetric=False)
        quantizer = Lsq(grid, Static(), ZeroPoint(grid)).eval()
        quantizer.start(s, round(share * grid.p))
        return quantizer

    parts = [fine(5e-4, 0.5) for _ in range(4)] + [fine(1.6e-5, 0.0)]
    with torch.no_grad():
        expected = attention(x)
        attention.set_processor(AttentionProcessor(*parts))
        found = attention(x)
    assert 0 < float((found - expected).abs().max()) < 2e-3


def test_cross_attention_and_masks_are_refused():
    attention = load_model("tiny").build().mid_block.attentions[0]
    attention.set_processor(AttentionProcessor(None))
    x = randn(1, 16, 4, 4)
    with pytest.raises(ValueError, match="self-attention"):
        attention(x, encoder_hidden_states=randn(1, 3, 16))
    with pytest.raises(ValueError, match="mask"):
        attention(x, attention_mask=torch.zeros(1, 16))


# --- The recipe's errors


@pytest.mark.parametrize("bits", [0, 1, 17, 3.5])
@pytest.mark.parametrize("of", ["weight_bits", "act_bits"])
def test_bits_out_of_range_are_errors(bits, of):
    options = {"weight_bits": 4, "act_bits": 4} | {of: bits}
    with pytest.raises(ValueError, match=f"bits={bits}"):
        Recipe(weight=Lsq, act=Lsq, **options)


@pytest.mark.parametrize("bits", [0, 1, 17, 3.5])
def test_edge_bits_out_of_range_are_errors(bits):
    model = load_model("tiny")
    net = model.build()
    with pytest.raises(ValueError, match=f"bits={bits}"):
        quantize(
            net, model.roles(net), make_recipe(plan=Plan(edge_bits=bits)), 1000, quantize_attention
        )


@pytest.mark.parametrize("interval", ["temporal", "per_step", "dynamic"])
def test_weights_refuse_an_interval_of_time_and_name_the_key(interval):
    with pytest.raises(ValueError, match=rf"weight\.interval='{interval}'.*choose one of static"):
        make_recipe(weight_interval=interval)


def test_unknown_zero_points_and_starts_are_errors_that_name_the_key():
    with pytest.raises(ValueError, match=r"tdq\.zero_point='dynamic'"):
        make_recipe(zero_point="dynamic")
    with pytest.raises(ValueError, match=r"habits\.habits\.start='mean'"):
        ReleaseDetails(start="mean")


def test_quantizing_twice_is_an_error():
    model = load_model("tiny")
    net = model.build()
    roles = model.roles(net)
    quantize(net, roles, make_recipe(), 1000, quantize_attention)
    with pytest.raises(ValueError, match="roles and layers differ"):
        quantize(net, roles, make_recipe(), 1000, quantize_attention)


# --- Offsets and habits


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("offset", ["static", "lower_bound", "by_role"])
def test_offsets_follow_the_recipe(interval, offset):
    net = started(interval=interval, zero_point=offset)
    roles = unet_roles(load_model("tiny").build())
    for name, role in roles.items():
        quantizer = net.get_submodule(name).input_quantizer
        if quantizer is not None:
            silu_over_time = role.after_silu and interval != "static"
            bounded = offset == "lower_bound" or (offset == "by_role" and silu_over_time)
            assert isinstance(quantizer.zero_point, LowerBound if bounded else ZeroPoint), name
    probabilities = net.mid_block.attentions[0].processor.probabilities
    assert isinstance(
        probabilities.zero_point, LowerBound if offset == "lower_bound" else ZeroPoint
    )


def test_the_releases_habits():
    net = started(habits=RELEASE_HABITS)
    roles = unet_roles(load_model("tiny").build())
    for name, role in roles.items():
        layer = net.get_submodule(name)
        assert (layer.weight_quantizer.grid.n, layer.weight_quantizer.grid.p) == (-6, 6)
        assert layer.weight_quantizer.interval.raw and layer.weight_quantizer.gradient_scale
        quantizer = layer.input_quantizer
        if quantizer is None:
            continue
        assert not quantizer.gradient_scale
        assert quantizer.interval.raw
        assert (quantizer.grid.n, quantizer.grid.p) == ((0, 14) if role.after_silu else (-6, 6)), (
            name
        )
        if role.after_silu:
            assert not quantizer.zero_point.beta.requires_grad
        else:
            assert quantizer.zero_point is None


def test_the_releases_lower_bound_stays_where_it_is():
    grid = Grid(4, symmetric=False)
    zero_point = LowerBound(grid, -0.2785, learned=False)
    zero_point.start(0.05, 1)
    assert float(zero_point.beta) == pytest.approx(-0.2785)
    assert float(zero_point(torch.tensor(0.05))) == 6
    assert zero_point(torch.tensor([0.05, 0.1, 0.001])).tolist() == [6, 3, 15]


# --- Baking


def check_baked(net):
    baked = bake(net)
    x = inputs()[0]
    with torch.no_grad():
        for t in (
            torch.tensor(0),
            torch.tensor(1),
            torch.tensor(500),
            torch.tensor(999),
            inputs()[1],
        ):
            expected = net(x, t, return_dict=False)[0]
            assert torch.equal(baked(x, t, return_dict=False)[0], expected)
            assert bool(torch.isfinite(expected).all()) and float(expected.std()) > 1e-3
    return baked


@pytest.mark.parametrize("rule", METHODS)
@pytest.mark.parametrize("interval", INTERVALS)
def test_baked_equals_unbaked_to_the_bit(rule, interval):
    check_baked(started(rule, interval))


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("offset", ["static", "lower_bound"])
def test_baked_equals_unbaked_with_either_offset(interval, offset):
    check_baked(started("lsq", interval, zero_point=offset))


@pytest.mark.parametrize("options", [
    {"bits": 2}, {"bits": 8}, {"bits": 16}, {"habits": RELEASE_HABITS}, {"plan": Plan(edge_bits=8)},
    {"plan": Plan(**RELEASE)}, {"interval": "temporal", "habits": RELEASE_HABITS, "plan": Plan(**RELEASE)},
])  # fmt: skip
def test_baked_equals_unbaked_with_other_slots(options):
    check_baked(started(**options))


def test_baked_equals_unbaked_after_calibration():
    check_baked(make_net(make_recipe("lsq", "temporal")))


def test_baking_leaves_the_original_as_it_was():
    net = started("lsq", "temporal").train()
    before = copy.deepcopy(net.state_dict())
    bake(net)
    assert net.training
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    net(*inputs())[0].sum().backward()
    assert float(net.generators.weights[-1].grad.abs().max()) > 0


@pytest.mark.parametrize("rule", METHODS)
def test_baking_in_place_is_baking_a_copy(rule):
    net = started(rule, "temporal")
    copied, x = bake(net), inputs()
    baked = bake(net, inplace=True)
    assert baked is net and "generators" not in dict(net.named_children())
    states = copied.state_dict(), baked.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    with torch.no_grad():
        assert torch.equal(copied(*x, return_dict=False)[0], baked(*x, return_dict=False)[0])


def test_a_copy_of_coded_weights_takes_no_dequantized_ones_along():
    layer = next(m for m in bake(started("lsq", "static")).modules() if isinstance(m, QuantLayer))
    coded = layer.weight_quantizer
    assert coded._w_hat is None  # baking keeps none
    w_hat = coded()
    twin = copy.deepcopy(coded)
    assert coded() is w_hat and twin._w_hat is None
    assert torch.equal(twin(), w_hat)


@pytest.mark.parametrize(
    ("bits", "interval"),
    [(2, "static"), (4, "per_step"), (4, "temporal"), (8, "static"), (16, "temporal")],
)
def test_a_baked_network_holds_codes_and_tables_alone(bits, interval):
    net = started("lsq", interval, bits)
    baked = bake(net)
    top = 2 ** (bits - 1) - 1
    coded = [module for module in baked.modules() if isinstance(module, QuantLayer)]
    assert len(coded) == len(unet_roles(load_model("tiny").build()))
    for layer in coded:
        assert layer.layer.weight is None
        codes = layer.weight_quantizer.codes
        assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert int(codes.min()) >= -top and int(codes.max()) <= top
        assert int(codes.abs().max()) >= top // 2
    for quantizer in activation_quantizers(baked).values():
        assert isinstance(quantizer.interval, LookupTable) and isinstance(
            quantizer.zero_point, TableZeroPoint
        )
        assert len(quantizer.interval.step_sizes) == (1 if interval == "static" else 1000)
        assert len(quantizer.zero_point.zero_points) in (1, len(quantizer.interval.step_sizes))
        assert torch.equal(
            quantizer.zero_point.zero_points, quantizer.zero_point.zero_points.round()
        )
    assert not any(isinstance(module, GeneratorBank) for module in baked.modules())
    assert not any(parameter.requires_grad for parameter in baked.parameters())
    assert not any(
        key.endswith("layer.weight") or key.startswith("generators") for key in baked.state_dict()
    )
    assert not baked.training


def test_a_baked_network_can_be_saved_and_loaded():
    source, moved = started("lsq", "temporal"), started("lsq", "temporal")
    stir(moved, 0.05)
    source, other = bake(source), bake(moved)
    x, t = inputs()
    with torch.no_grad():
        expected = source(x, t)[0]
        assert not torch.equal(other(x, t)[0], expected)
        other.load_state_dict(source.state_dict())
        assert torch.equal(other(x, t)[0], expected)


def test_a_baked_network_has_a_time_of_its_own_and_can_be_baked_again():
    net = started("lsq", "temporal")
    baked = check_baked(net)
    assert baked.time is not net.time
    for quantizer in activation_quantizers(baked).values():
        assert quantizer.interval.time is baked.time
    again = check_baked(baked)
    assert again is not baked


def test_dorefas_weights_are_baked_as_they_are():
    recipe = make_recipe()
    recipe = Recipe(4, 4, DorefaWeights, recipe.act, recipe.intervals, weight_interval="max_abs")
    net = make_net(recipe, calibrated=False)
    for quantizer in activation_quantizers(net).values():
        quantizer.start(0.1, 5)
    baked = bake(net)
    assert not any(isinstance(module, CodedWeight) for module in baked.modules())
    with torch.no_grad():
        assert torch.equal(baked(*inputs())[0], net.eval()(*inputs())[0])


def test_dorefas_weights_can_be_calibrated():
    recipe = make_recipe()
    recipe = Recipe(4, 4, DorefaWeights, recipe.act, recipe.intervals, weight_interval="max_abs")
    net = make_net(recipe, calibrated=False)
    with calibrate.calibrating(net, 1), torch.no_grad():
        net(*inputs())
    with torch.no_grad():
        assert bool(torch.isfinite(net(*inputs())[0]).all())


# --- Numbers


@pytest.mark.parametrize("rule", METHODS)
@pytest.mark.parametrize("interval", INTERVALS)
def test_sixteen_bits_are_close_to_float(rule, interval, monkeypatch):
    monkeypatch.setattr(
        calibrate, "KEPT", 4096
    )  # as many as there are: at 16 bits a cut-off tail would be the error
    model = load_model("tiny")
    x, t = inputs(2)
    with torch.no_grad():
        expected = model.build().eval()(x, t)[0]
        errors = {}
        for bits in (16, 5) if rule == "lsq" else (16,):
            net = make_net(make_recipe(rule, interval, bits), calibrated=False)
            with calibrate.calibrating(net, 1, "error"):
                net(x, t)
            if interval == "temporal":
                # A range that moves with t by a tenth would cut off what 16 bits can tell: let it stand still.
                net.generators.weights[-1].zero_()
            errors[bits] = float((net(x, t)[0] - expected).norm() / expected.norm())
    assert errors[16] < 0.01
    assert errors.get(5, 1.0) > 5 * errors[16]


def test_a_float_network_under_calibration_is_the_float_network():
    model = load_model("tiny")
    x, t = inputs()
    net = make_net(make_recipe("lsq", "temporal"), calibrated=False)
    with torch.no_grad(), calibrate.calibrating(net, 1):
        found = net(x, t)[0]
        expected = model.build().eval()(x, t)[0]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("interval", INTERVALS)
def test_autocast_leaves_quantizers_in_single_precision(interval, training):
    net = started("lsq", interval).train(training)
    x, t = inputs()
    steps, outputs = {}, {}

    def note(name):
        def hook(quantizer, args, output):
            outputs[name] = output.dtype
            steps.setdefault(name, []).append(quantizer.parameters_at(args[0].float())[0].detach())

        return hook

    for name, quantizer in net.named_modules():
        if isinstance(quantizer, Quantizer):
            quantizer.register_forward_hook(note(name))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            net(x, t)
        assert set(outputs.values()) == {torch.float32}
        net(x, t)
    for name, (under_autocast, plain) in steps.items():
        assert under_autocast.dtype == torch.float32, name
        assert torch.equal(under_autocast, plain), name


@pytest.mark.parametrize("rule", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_padded_border_is_exactly_zero(rule, bits):
    net = started(rule, "temporal", bits)
    layer = net.down_blocks[0].resnets[0].conv1
    assert isinstance(layer, QuantConv2d) and layer.layer.padding == (1, 1)
    x = randn(3, 8, 6, 6)
    with torch.no_grad(), net.time.at(torch.tensor([0, 500, 999])):
        z = layer.input_quantizer.parameters_at(x)[1]
        assert float(z.min()) > 0
        x_hat, w_hat = layer.operands(x)
        padded = F.pad(x_hat, (1, 1, 1, 1)).double()
        conv = layer.layer
        expected = F.conv2d(padded, w_hat.double(), conv.bias.double(), conv.stride)
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)
        # With an input of nothing but zeros, nothing but the bias is left, at the border as in the middle.
        silent = layer(torch.zeros(3, 8, 6, 6))
        assert torch.equal(silent, conv.bias.reshape(1, -1, 1, 1).expand_as(silent))


@pytest.mark.parametrize("options", [
    {"stride": 2}, {"padding": 2}, {"dilation": 2, "padding": "same"}, {"groups": 2}, {"bias": False},
    {"padding": 1, "padding_mode": "circular"},
])  # fmt: skip
def test_a_quantized_convolution_keeps_the_options_of_its_layer(options):
    conv = nn.Conv2d(4, 6, 3, **options)

    class Same(nn.Module):
        def forward(self, w):
            return w

    x = randn(2, 4, 7, 7)
    with torch.no_grad():
        assert torch.equal(QuantConv2d(conv, Same(), None)(x), conv(x))


def test_a_quantized_linear_layer_keeps_its_bias_and_leading_axes():
    class Same(nn.Module):
        def forward(self, w):
            return w

    for bias in (True, False):
        linear = nn.Linear(5, 3, bias=bias)
        x = randn(2, 4, 5)
        with torch.no_grad():
            assert torch.equal(QuantLinear(linear, Same(), None)(x), linear(x))


@pytest.mark.parametrize(
    ("n", "p", "dtype"),
    [
        (-7, 7, torch.int8), (-127, 127, torch.int8), (-128, 127, torch.int8), (0, 255, torch.uint8),
        (-1, 255, torch.int16), (-32767, 32767, torch.int16), (0, 65535, torch.int32), (-40000, 5, torch.int32),
    ],
)  # fmt: skip
def test_smallest_integer_type(n, p, dtype):
    assert smallest_integer_type(n, p) == dtype


def test_codes_too_large_for_any_type_are_an_error():
    with pytest.raises(ValueError, match="no integer type"):
        smallest_integer_type(0, 2**40)


# --- The network as a module


def test_every_parameter_of_a_quantized_network_gets_a_gradient():
    for rule in METHODS:
        net = started(rule, "temporal").train()
        x, t = inputs(8)
        net(x, t)[0].mul(randn(8, 1, 8, 8, seed=3)).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), (
                rule,
                name,
            )


def test_state_round_trip_of_a_quantized_network():
    source, target = (
        started("lsq", "temporal"),
        make_net(make_recipe("lsq", "temporal"), calibrated=False),
    )
    target.load_state_dict(source.state_dict())
    x, t = inputs()
    with torch.no_grad():
        assert torch.equal(target(x, t)[0], source(x, t)[0])


def test_nothing_is_counted_in_forward():
    net = started("nipq", "temporal")
    before = copy.deepcopy(net.state_dict())
    x, t = inputs()
    with torch.no_grad():
        first = net(x, t)[0]
        assert torch.equal(net(x, t)[0], first)
        net.train()(x, t)
        assert torch.equal(net.eval()(x, t)[0], first)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_nipqs_noise_is_there_while_training_until_it_is_switched_off():
    net = started("nipq")
    x, t = inputs()
    quiet = [module for module in net.modules() if isinstance(module, Nipq)]
    with torch.no_grad():
        still = net(x, t)[0]
        torch.manual_seed(0)
        assert not torch.equal(net.train()(x, t)[0], still)
        for quantizer in quiet:
            quantizer.noisy = False
        assert torch.allclose(net(x, t)[0], still, atol=1e-5)


def test_layer_map_describes_every_leaf():
    model = load_model("tiny")
    net = model.build()
    roles = model.roles(net)
    quantize(
        net,
        roles,
        make_recipe("lsq", "temporal", plan=Plan(edge_bits=8, keep_float=["shortcut"])),
        1000,
        quantize_attention,
    )
    rows = {row["layer"]: row for row in layer_map(net, roles)}
    assert rows.keys() >= roles.keys()
    assert rows["conv_in"]["weight"] == "Lsq -127..127, Static"
    assert rows["conv_in"]["input"] == "Lsq 0..255, Temporal, learned z"
    assert rows["conv_out"]["input"] == "Lsq 0..255, Temporal, z(t) from a lower bound"
    assert rows["mid_block.resnets.0.conv1"]["weight"] == "Lsq -7..7, Static"
    assert rows["mid_block.attentions.0.to_k"]["input"] == "shared: mid_block.attentions.0.input"
    assert rows["mid_block.attentions.0.probabilities"]["input"] == "Lsq 0..15, Temporal, learned z"
    shortcuts = [row for row in rows.values() if row["role"] == "shortcut"]
    assert shortcuts and all(row["weight"] == row["input"] == "float" for row in shortcuts)
    start_quickly(net)
    baked = {row["layer"]: row for row in layer_map(bake(net), roles)}
    assert baked["conv_in"]["weight"] == "codes int8"
    assert baked["conv_out"]["input"] == "Lsq 0..255, LookupTable, z table"
