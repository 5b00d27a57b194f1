"""Blocks of a network, and one block's reconstruction beside a plain loop that does the same step for step."""

from __future__ import annotations

import copy
import threading
from functools import lru_cache

import pytest
import torch
from torch import nn

from tdq_exp.config.setting import check
from tdq_exp.diffusion.draws import Stream, generator
from tdq_exp.fit.options import ReconstructOptions
from tdq_exp.fit.ptq.blocks import blocks_of, inputs_of, output_of
from tdq_exp.fit.ptq.capture import Spill
from tdq_exp.fit.ptq.reconstruct import (
    BlockData,
    Reconstruction,
    balancing_weights,
    output_loss,
    sample_losses,
    trainable,
)
from tdq_exp.quant.convert import Recipe, activation_quantizers, code_weights
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.temporal import GeneratorBank, Temporal
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.rules.adaround import AdaRound
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMaxWeights
from tdq_exp.quant.zero_point import LowerBound
from tests.oracles import adaround as rounding_oracle
from tests.oracles import reconstruction as oracle
from tests.quant.builders import INTERVALS, STEPS, load_model, make_net, randn, start_quickly

BLOCK = "down_blocks.1.resnets.0"  # with a shortcut: 8 channels in, 16 out
SAMPLES, BATCH = 24, 8
KEY = (7, 3)


class Alone:
    """One process, without what accelerate keeps for the interpreter."""

    rank, world, main = 0, 1, True
    device = torch.device("cpu")

    def decide(self, make):
        return make()


class Together(Alone):
    """One of two processes that are threads."""

    def __init__(self, rank, meeting, shared):
        self.rank, self.world, self._meeting, self._shared = rank, 2, meeting, shared

    def mean(self, value):
        self._shared[self.rank] = value.clone()
        self._meeting.wait(30)
        found = (self._shared[0] + self._shared[1]) / 2
        self._meeting.wait(30)
        return found


def options(**changed):
    numbers = {
        "updates": 5,
        "batch_size": BATCH,
        "lr": 0.02,
        "lr_zero_point": 0.03,
        "lr_generator": 0.01,
        **changed,
    }
    return ReconstructOptions(**numbers)


def samples(count=SAMPLES, seed=0):
    t = torch.randint(STEPS, (count,), generator=torch.Generator().manual_seed(seed))
    return randn(count, 1, 8, 8, seed=seed), t


def made(interval, zero_point="by_role"):
    """(model, float net, quantized net with coded weights): only what is to be learned takes gradients."""
    return copy.deepcopy(_made(interval, zero_point))


@lru_cache
@torch.no_grad()
def _made(interval, zero_point):
    model = load_model("tiny")
    recipe = Recipe(
        4,
        4,
        MinMaxWeights,
        Lsq,
        INTERVALS[interval](),
        weight_interval="channel_range",
        zero_point=zero_point,
    )
    net, float_net = make_net(recipe, calibrated=False), model.build().eval()
    quantizers, seen = activation_quantizers(net), {}
    for name, quantizer in quantizers.items():
        quantizer.observer = lambda value, name=name: seen.update(
            {name: (float(value.min()), float(value.max()))}
        )
    net(*samples())
    for name, quantizer in quantizers.items():
        low, high = min(seen[name][0], -1e-3), max(seen[name][1], 1e-3)
        quantizer.observer = None
        quantizer.start(
            0.7 * (high - low) / quantizer.grid.p, round(quantizer.grid.p * low / (low - high))
        )  # something is clipped
    code_weights(net)
    learned = [*quantizers.values()] + [m for m in net.modules() if type(m) is GeneratorBank]
    net.requires_grad_(False)
    for module in learned:
        module.requires_grad_()
    float_net.requires_grad_(False)
    return model, float_net, net


def the_block(net, model, name=BLOCK):
    return next(
        block for block in blocks_of(net, model, model.roles(model.build())) if block.name == name
    )


def shown(net, float_net, name=BLOCK):
    """What the block of the quantized net is shown, and what the one of the float net answers."""
    x, t = samples()
    call = inputs_of(net, name, lambda: net(x, t))
    target = output_of(float_net, name, lambda: float_net(x, t))
    stores = [Spill(SAMPLES, tensor.shape[1:]) for tensor in (*call.tensors, target)]
    for store, tensor in zip(stores, (*call.tensors, target), strict=True):
        store.put(0, tensor)
    train, held_out = torch.arange(20), torch.arange(20, SAMPLES)
    return BlockData(call, stores[:-1], stores[-1], t, train, held_out)


def reconstruction(interval, processes=None, zero_point="by_role", **changed):
    model, float_net, net = made(interval, zero_point=zero_point)
    data = shown(net, float_net)
    work = Reconstruction(
        net, the_block(net, model), data, options(**changed), KEY, processes or Alone()
    )
    return work, net, float_net


def drawn(work, phase, update):
    """The samples of an update."""
    g = generator(KEY[0], Stream.BLOCK_BATCH, KEY[1], phase, update)
    return work.data.train[torch.randint(len(work.data.train), (BATCH,), generator=g)]


def everything(net):
    """A copy of the network's whole state."""
    return {key: value.clone() for key, value in net.state_dict().items()}


# The loop


def as_numbers(work):
    """The block's quantizers as the oracle's, with leaves of their own; by the name of the layer that reads them."""
    found = {}
    for name, quantizer in work.block.quantizers.items():
        one = oracle.FakeQuantizer(quantizer.grid.p)
        if isinstance(quantizer.interval, Temporal):
            bank, row = quantizer.interval.bank, quantizer.interval.row
            pairs = zip(bank.weights, bank.biases, strict=True)
            one.generator = [(leaf(weight[row]), leaf(bias[row])) for weight, bias in pairs]
        else:
            one.rho = leaf(quantizer.interval.rho)
        if isinstance(quantizer.zero_point, LowerBound):
            one.beta = leaf(quantizer.zero_point.beta)
        else:
            one.zeta = leaf(quantizer.zero_point.zeta)
        found[name.removeprefix(f"{work.block.name}.").removesuffix(".input_quantizer")] = one
    return found


def leaf(value):
    return value.detach().clone().requires_grad_()


def block_weights(module):
    """The block's weights and biases, quantized, under the names of diffusers."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, QuantLayer):
            found |= {f"{name}.weight": part.weight_quantizer(), f"{name}.bias": part.layer.bias}
        elif isinstance(part, nn.GroupNorm):
            found |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    return found


def with_rates(quantizers, o):
    found = []
    for one in quantizers.values():
        found += [(one.rho, o.lr)] if one.generator is None else []
        found += [(part, o.lr_generator) for pair in one.generator or [] for part in pair]
        found += [(one.beta, o.lr)] if one.zeta is None else [(one.zeta, o.lr_zero_point)]
    return found


@pytest.mark.parametrize("zero_point", ["by_role", "static"])
@pytest.mark.parametrize("interval", INTERVALS)
def test_a_reconstruction_is_the_plain_loop_step_for_step(interval, zero_point):
    work, net, _ = reconstruction(interval, zero_point=zero_point)
    quantizers, weights = as_numbers(work), block_weights(work.module)
    assert quantizers.keys() == {"conv1", "conv2", "conv_shortcut", "time_emb_proj"}
    (x, temb), target, t = work.data.inputs, work.data.target, work.data.t

    def forward(index):
        def quantize(layer, value):
            return quantizers[layer](value, t[index], STEPS)

        return oracle.residual_block(weights, 4, 1e-6, x.take(index), temb.take(index), quantize)

    index = drawn(work, 0, 0)
    with torch.no_grad():  # the same block to begin with
        assert torch.allclose(work.output(index), forward(index), rtol=1e-5, atol=1e-5)

    def loss_at(update):
        index = drawn(work, 0, update)
        return (forward(index) - target.take(index)).abs().pow(2.4).sum(1).mean()

    before = {name: copy.deepcopy(one) for name, one in as_numbers(work).items()}
    said = []
    work.train_activations(said.append)
    losses = oracle.descend(with_rates(quantizers, work.options), loss_at, 5)
    assert [float(one.removeprefix(BLOCK)) for one in said] == pytest.approx(
        losses, rel=1e-2
    )  # as it is shown
    moved = []
    for layer, one in as_numbers(work).items():
        for name in ("rho", "zeta", "beta"):
            if getattr(one, name) is not None:
                found, expected = getattr(one, name), getattr(quantizers[layer], name)
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (layer, name)
                moved.append((found - getattr(before[layer], name)).abs().max())
        for mine, theirs, start in zip(
            one.generator or [],
            quantizers[layer].generator or [],
            before[layer].generator or [],
            strict=True,
        ):
            for found, expected, old in zip(mine, theirs, start, strict=True):
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), layer
                moved.append((found - old).abs().max())
    assert min(moved) > 1e-3  # all of it has been trained


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (6, 7)])
def test_the_loss_is_the_sum_over_channels_and_the_mean_over_all_else(shape, power):
    found, target = randn(*shape, seed=1), randn(*shape, seed=2)
    assert float(output_loss(found, target, power)) == pytest.approx(
        oracle.block_loss(found, target, power), rel=1e-5
    )


def test_the_loss_over_many_samples_is_that_of_each_averaged():
    work, _, _ = reconstruction("temporal")
    index = torch.arange(19)  # batches of 8, 8 and 3
    with torch.no_grad():
        each = [
            float(output_loss(work.output(i[None]), work.data.target.take(i[None]), 2.4))
            for i in index
        ]
    assert work.loss(index, 2.4) == pytest.approx(sum(each) / 19, rel=1e-4)


def test_balanced_time_steps_weigh_alike_and_equal_ones_are_never_parted():
    t = torch.tensor([0] * 30 + list(range(10, 100, 10)) * 10)
    losses = torch.where(t == 0, 500.0, 1.0 + t / 100)
    weights = balancing_weights(t, losses, t, groups=10)
    weighted = weights * losses
    assert float(weighted.mean()) == pytest.approx(float(losses.mean()), rel=1e-5)
    of_each = [float(weighted[t == step].mean()) for step in t.unique()]
    assert max(of_each) < 1.2 * min(of_each)  # up to the neighbours that share a group
    assert weights[:30].unique().numel() == 1
    assert torch.equal(
        balancing_weights(t, losses, torch.tensor([0, 5, 95, 999]), 10)[[0, 2]], weights[[0, -1]]
    )
    flat = balancing_weights(t, torch.full_like(losses, 3.0), t)
    assert torch.allclose(flat, torch.ones_like(flat))
    assert balancing_weights(t, torch.where(t == 0, 0.0, 1.0), t).isfinite().all()


def test_the_balanced_loss_is_each_samples_times_its_weight():
    work, _, _ = reconstruction("temporal", balance=True)
    index = torch.arange(19)
    with torch.no_grad():
        each = torch.tensor(
            [
                float(output_loss(work.output(i[None]), work.data.target.take(i[None]), 2.4))
                for i in index
            ]
        )
    plain = work.loss(index, 2.4)
    work.balance(work.data.train)
    assert work.weights is not None and work.weights.unique().numel() > 1
    assert work.loss(index, 2.4) == pytest.approx(
        float((each * work.weights[index]).mean()), rel=1e-4
    )
    assert work.loss(index, 2.4) != pytest.approx(plain, rel=1e-3)
    before = work.loss(work.data.train, 2.4)
    work.train_activations(lambda said: None)
    assert work.loss(work.data.train, 2.4) < before


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (6, 7)])
def test_losses_of_samples_average_to_the_loss(shape):
    found, target = randn(*shape, seed=1), randn(*shape, seed=2)
    each = sample_losses(found, target, 2.4)
    assert each.shape == shape[:1]
    assert float(each.mean()) == pytest.approx(float(output_loss(found, target, 2.4)), rel=1e-5)


@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_many_updates_lower_the_loss(interval):
    work, _, _ = reconstruction(interval, updates=60)
    index = torch.arange(20)
    before = work.loss(index, 2.4)
    work.train_activations(lambda said: None)
    assert work.loss(index, 2.4) < 0.99 * before


@pytest.mark.parametrize("interval", INTERVALS)
def test_training_a_block_changes_nothing_else_of_the_network(interval):
    work, net, float_net = reconstruction(interval)
    before, of_float, modes = (
        everything(net),
        everything(float_net),
        [m.training for m in net.modules()],
    )
    work.train_activations(lambda said: None)
    own = [f"{name}." for name in work.block.quantizers]
    own += [
        f"generators.{name.replace('input_quantizer', 'input')}." for name in work.block.quantizers
    ]
    changed = [key for key, value in everything(net).items() if not torch.equal(value, before[key])]
    assert changed and all(any(key.startswith(prefix) for prefix in own) for key in changed)
    assert all(torch.equal(value, of_float[key]) for key, value in float_net.state_dict().items())
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_the_same_key_gives_the_same_bits_and_another_key_others(interval):
    states = []
    for key in (KEY, KEY, (KEY[0], KEY[1] + 1), (KEY[0] + 1, KEY[1])):
        work, net, _ = reconstruction(interval)
        work.key = key
        torch.manual_seed(len(states))  # without dropout nothing is drawn from the global generator
        work.train_activations(lambda said: None)
        states.append(torch.cat([value.double().flatten() for value in everything(net).values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2]) and not torch.equal(states[0], states[3])


# What is trained


@pytest.mark.parametrize("interval", INTERVALS)
def test_gradients_reach_what_is_trainable_and_nothing_else(interval):
    work, net, _ = reconstruction(interval)
    with trainable(work.block.quantizers) as learned:
        assert all(quantizer.training for quantizer in work.block.quantizers.values())
        inside = {id(parameter) for parameter in learned.parameters()}
        work.output(torch.arange(8)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.parameters())
        assert [
            name for name, p in net.named_parameters() if p.grad is not None and id(p) not in inside
        ] == []
        if interval == "temporal":  # a copy of its own is trained, not the network's bank
            assert not {id(p) for p in net.generators.parameters()} & inside


def test_generators_go_back_to_their_own_rows_and_the_others_stay_bit_for_bit():
    work, net, _ = reconstruction("temporal")
    bank = net.generators
    rows = [quantizer.interval.row for quantizer in work.block.quantizers.values()]
    others = [row for row in range(len(bank.names)) if row not in rows]
    assert len(others) > 30
    intervals = {name: quantizer.interval for name, quantizer in work.block.quantizers.items()}
    before = [parameter.clone() for parameter in bank.parameters()]
    table = bank.table().clone()
    with trainable(work.block.quantizers) as learned:
        part = learned[-1]
        with torch.no_grad():
            for k, parameter in enumerate(part.parameters()):
                parameter += (k + 1) * torch.arange(1, len(rows) + 1).reshape(
                    -1, *[1] * (parameter.dim() - 1)
                )
        names = list(part.names)
    for k, (old, new) in enumerate(zip(before, bank.parameters(), strict=True)):
        assert torch.equal(new[others], old[others])
        for place, name in enumerate(names):
            row = bank.names.index(name)
            assert torch.equal(new[row], old[row] + (k + 1) * (place + 1))
    for name, quantizer in work.block.quantizers.items():
        assert quantizer.interval is intervals[name]
        assert not quantizer.training
    assert not torch.equal(bank.table()[rows], table[rows])  # what is read in eval follows
    assert torch.equal(bank.table()[others], table[others])


def test_trained_generators_are_read_as_they_were_trained():
    work, net, _ = reconstruction("temporal")
    with trainable(work.block.quantizers) as learned:
        with torch.no_grad():
            for parameter in learned[-1].parameters():
                parameter += 0.05 * randn(*parameter.shape)
        for quantizer in work.block.quantizers.values():
            quantizer.eval()
        learned[-1].eval()
        with torch.no_grad():
            within = work.output(torch.arange(8))
    with torch.no_grad():
        assert torch.allclose(work.output(torch.arange(8)), within, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interval", INTERVALS)
def test_an_error_within_leaves_the_network_whole(interval):
    work, net, _ = reconstruction(interval)
    before, modes = everything(net), [module.training for module in net.modules()]
    intervals = {name: quantizer.interval for name, quantizer in work.block.quantizers.items()}
    with pytest.raises(KeyboardInterrupt), trainable(work.block.quantizers):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(
        quantizer.interval is intervals[name] for name, quantizer in work.block.quantizers.items()
    )
    assert [module.training for module in net.modules()] == modes


# AdaRound


def roundable(work, float_net):
    """(layers, float weights and grids) of the block."""
    layers = {
        f"{BLOCK}.{k}": m for k, m in work.module.named_modules() if isinstance(m, QuantLayer)
    }
    grid = Grid(4, symmetric=False)
    return layers, {name: (float_net.get_parameter(f"{name}.weight"), grid) for name in layers}


def test_rounding_changes_codes_by_at_most_one_and_nothing_else():
    work, net, float_net = reconstruction(
        "static", rounding="adaround", rounding_updates=12, lr_rounding=0.3
    )
    layers, weights = roundable(work, float_net)
    before = everything(net)
    work.train_rounding(layers, weights, lambda said: None)
    after = everything(net)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and changed <= {f"{name}.weight_quantizer.codes" for name in layers}
    for key in changed:
        difference = after[key].int() - before[key].int()
        assert difference.abs().max() == 1
        assert (difference != 0).float().mean() < 0.6
        assert after[key].dtype == before[key].dtype
    for name, layer in layers.items():  # from the floor, at most one
        coded, weight = layer.weight_quantizer, weights[name][0]
        floor = (weight / coded.step_size).floor() + coded.zero_point
        up = coded.codes - floor
        inside = (floor >= 0) & (floor < 15)
        assert set(up[inside].tolist()) <= {0.0, 1.0}
    assert all(quantizer.observer is None for quantizer in work.block.quantizers.values())
    assert not any(isinstance(module, AdaRound) for module in net.modules())


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_rounding_is_the_plain_loop_step_for_step(warmup):
    numbers = {
        "rounding": "adaround", "rounding_updates": 6, "lr_rounding": 0.4, "rounding_weight": 0.05,
        "rounding_warmup": warmup,
    }  # fmt: skip
    work, net, float_net = reconstruction("static", **numbers)
    layers, weights = roundable(work, float_net)
    fixed, v, parts = block_weights(work.module), {}, {}
    for name, (weight, grid) in weights.items():
        coded = layers[name].weight_quantizer
        parts[name] = (weight, coded.step_size, coded.zero_point, grid.n, grid.p)
        v[name] = leaf(AdaRound(*parts[name]).V)
    (x, temb), target = work.data.inputs, work.data.target

    def loss_at(update):
        index = drawn(work, 1, update)
        soft = {
            f"{name.removeprefix(f'{BLOCK}.')}.weight": rounding_oracle.soft_weights(*part, v[name])
            for name, part in parts.items()
        }
        found = oracle.residual_block(
            {**fixed, **soft}, 4, 1e-6, x.take(index), temb.take(index), lambda layer, value: value
        )  # activations in float
        loss = (found - target.take(index)).square().sum(1).mean()
        beta = rounding_oracle.beta(update, 6, 20.0, 2.0, warmup)
        return (
            loss
            if beta is None
            else loss + 0.05 * sum(rounding_oracle.terms(one, beta) for one in v.values())
        )

    start = {name: layer.weight_quantizer.codes.clone() for name, layer in layers.items()}
    said = []
    work.train_rounding(layers, weights, said.append)
    losses = oracle.descend([(one, 0.4) for one in v.values()], loss_at, 6, cosine=False)
    assert [float(one.removeprefix(BLOCK)) for one in said] == pytest.approx(
        losses, rel=1e-2
    )  # as it is shown
    flipped = same = total = 0
    for name, (weight, s, z, n, p) in parts.items():
        up = (torch.sigmoid(v[name].detach()) * 1.2 - 0.1).clamp(0, 1)
        expected = ((weight / s).floor() + (up >= 0.5) + z).clamp(n, p)
        found = layers[name].weight_quantizer.codes
        same, total = same + int((found == expected).sum()), total + found.numel()
        flipped += int((found != start[name]).sum())
    assert flipped > 50
    assert same >= total - 2  # an h that ends at one half but for a last bit


# Two processes


@pytest.mark.parametrize(
    "interval, phase",
    [("static", "activations"), ("temporal", "activations"), ("static", "rounding")],
)
def test_two_processes_share_a_batch_and_train_as_one(interval, phase):
    numbers = {
        "rounding": "adaround",
        "rounding_updates": 5,
        "lr_rounding": 0.3,
        "rounding_weight": 0.05,
    }
    numbers |= {"updates": 4}
    meeting, shared = threading.Barrier(2), {}
    works = [
        reconstruction(interval, processes, **numbers)
        for processes in (Alone(), Together(0, meeting, shared), Together(1, meeting, shared))
    ]

    def train(work, float_net):
        if phase == "rounding":
            work.train_rounding(*roundable(work, float_net), lambda said: None)
        else:
            work.train_activations(lambda said: None)

    before = everything(works[0][1])
    train(works[0][0], works[0][2])
    threads = [
        threading.Thread(target=train, args=(work, float_net)) for work, _, float_net in works[1:]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone, one, other = (everything(net) for _, net, _ in works)
    assert any(not torch.equal(alone[key], before[key]) for key in alone)
    for key, value in alone.items():
        assert torch.equal(one[key], other[key]), key
        if value.is_floating_point():
            assert torch.allclose(value, one[key], rtol=1e-4, atol=2e-5), key
        else:
            assert (value != one[key]).sum() <= 1, key


class Half(Alone):
    """One of two processes, which hears nothing of the other."""

    world = 2

    def mean(self, value):
        return value


def test_a_batch_that_processes_cannot_share_evenly_is_refused():
    # Unequal parts weigh alike when their gradients are averaged: it would not be the batch's mean.
    work, _, _ = reconstruction("static", Half(), batch_size=7)
    with pytest.raises(
        ValueError, match=r"fit\.batch_size=7 does not divide by the number of processes \(2\)"
    ):
        work.train_activations(lambda said: None)


# Blocks


def test_blocks_come_in_running_order_and_hold_each_activation_quantizer_once():
    model, float_net, net = made("static")
    names = {role.block for role in model.roles(float_net).values()}
    order, handles = [], []
    for name in names:
        hook = lambda module, args, name=name: order.append(name)  # noqa: E731
        handles.append(float_net.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        float_net(*samples(2))
    found = blocks_of(net, model, model.roles(float_net))
    assert [block.name for block in found] == order
    assert set(order) == names and order[0] == "time_embedding" and order[-1] == "conv_out"
    held = [
        (name, id(quantizer)) for block in found for name, quantizer in block.quantizers.items()
    ]
    assert sorted(held) == sorted((name, id(q)) for name, q in activation_quantizers(net).items())
    assert len({name for name, _ in held}) == len(held) > 40


def test_a_block_without_a_quantized_layer_is_left_out():
    model = load_model("tiny")
    from tdq_exp.quant.plan import Plan

    plan = Plan(keep_float=["first", "last", "time_embedding", "time_projection"], attention=False)
    recipe = Recipe(
        4, 4, MinMaxWeights, Lsq, INTERVALS["static"](), weight_interval="channel_range", plan=plan
    )
    net = make_net(recipe, calibrated=False)
    start_quickly(net)
    names = [block.name for block in blocks_of(net, model, model.roles(model.build()))]
    assert not {"conv_in", "conv_out", "time_embedding"} & set(names)
    assert names[0] == "down_blocks.0.resnets.0" and len(names) > 8


def counted(net, names):
    """Calls of each block, in order, while the hooks are there."""
    calls = []
    handles = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: calls.append(name)
        )
        for name in names
    ]
    return calls, handles


@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_inputs_and_outputs_are_what_hooks_on_a_whole_run_see_and_later_blocks_do_not_run(interval):
    model, float_net, net = made(interval)
    x, t = samples(5)
    blocks = [block.name for block in blocks_of(net, model, model.roles(float_net))]
    for of in (net, float_net):
        inputs, outputs, handles = {}, {}, []
        for name in blocks:

            def keep(module, args, kwargs, output, name=name, inputs=inputs, outputs=outputs):
                values = [*args, *kwargs.values()]
                inputs[name] = [
                    value.clone() for value in values if isinstance(value, torch.Tensor)
                ]
                outputs[name] = output.clone()

            handles.append(of.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
        with torch.no_grad():
            of(x, t)
        for handle in handles:
            handle.remove()
        calls, handles = counted(of, blocks)
        for place, name in enumerate(blocks):
            calls.clear()
            call = inputs_of(of, name, lambda of=of: of(x, t))
            assert calls in (
                blocks[:place],
                blocks[: place + 1],
            )  # it is asked for its input, and then no more
            calls.clear()
            output = output_of(of, name, lambda of=of: of(x, t))
            assert calls == blocks[: place + 1]
            assert len(call.tensors) == len(inputs[name]) > 0
            assert all(
                torch.equal(a, b) for a, b in zip(call.tensors, inputs[name], strict=True)
            ), name
            assert torch.equal(output, outputs[name]), name
            assert not call.tensors[0].requires_grad and not output.requires_grad
            with torch.no_grad():
                assert torch.equal(
                    call.again(of.get_submodule(name), call.tensors), outputs[name]
                ), name
        for handle in handles:
            handle.remove()


def test_a_call_can_be_repeated_with_other_tensors_in_the_same_places():
    model, float_net, net = made("temporal")
    few, many = samples(3, seed=1), samples(7, seed=2)
    for name in (BLOCK, "mid_block.attentions.0", "time_embedding", "conv_in"):
        call = inputs_of(net, name, lambda: net(*few))
        other = inputs_of(net, name, lambda: net(*many))
        output = output_of(net, name, lambda: net(*many))
        with torch.no_grad(), net.time.at(many[1]):
            assert torch.equal(call.again(net.get_submodule(name), other.tensors), output), name
        assert len(call.tensors[0]) == 3  # the call itself is as it was


def test_no_hook_stays_behind():
    model, float_net, net = made("static")
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())  # noqa: E731
    before = hooks()
    blocks_of(net, model, model.roles(float_net))
    inputs_of(net, BLOCK, lambda: net(*samples(2)))
    output_of(net, BLOCK, lambda: net(*samples(2)))
    for of in (inputs_of, output_of):
        with pytest.raises(RuntimeError, match=f"{BLOCK}: the network does not call it"):
            of(net, BLOCK, lambda: None)
        with pytest.raises(ZeroDivisionError):
            of(net, BLOCK, lambda: 1 / 0)
    assert hooks() == before


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"rounding": "up"}, "fit.rounding='up': choose nearest or adaround"),
        ({"updates": 0}, "fit.updates=0: must be at least 1"),
        ({"batch_size": 0}, "fit.batch_size=0: must be at least 1"),
    ],
)
def test_options_that_make_no_sense_name_their_key(changed, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        check(options(**changed), "fit")
