"""A step size depends on the time step that is set, and on nothing else: not on calls, order, or another network."""

import copy

import pytest
import torch

from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.intervals.static import PerStep
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.time import TimeContext
from tests.quant.builders import (
    STEPS,
    inputs,
    make_interval,
    make_net,
    make_quantizer,
    make_recipe,
    randn,
    start_quickly,
    stir,
)

TIMED = ("per_step", "temporal")


def timed_net(interval="temporal"):
    """A quantized network whose step sizes differ clearly over time."""
    net = make_net(make_recipe("lsq", interval), calibrated=False)
    start_quickly(net)
    for module in net.modules():
        if isinstance(module, PerStep):
            stir(module, 0.3)
    if interval == "temporal":
        stir(net.generators, 0.05)
    return net


def steps_seen(net, times, training=False):
    """The step sizes that each quantizer used at each time step of a sequence, as `{t: {quantizer: s}}`."""
    seen = {}
    hooks = []

    def note(name):
        def hook(quantizer, args, output):
            s, z = quantizer.parameters_at(args[0])
            seen.setdefault(name, []).append((float(s.detach()), float(z.detach())))

        return hook

    for name, quantizer in net.named_modules():
        if isinstance(quantizer, Quantizer):
            hooks.append(quantizer.register_forward_hook(note(name)))
    net.train(training)
    x = randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in times:
            net(x, torch.tensor(t))
    for hook in hooks:
        hook.remove()
    by_time: dict[int, list] = {}
    for index, t in enumerate(times):
        by_time.setdefault(t, []).append({name: values[index] for name, values in seen.items()})
    return by_time


# --- The context


@pytest.mark.parametrize("interval", TIMED)
@pytest.mark.parametrize("training", [True, False])
def test_reading_an_unset_time_is_an_error(interval, training):
    quantizer, _, bank = make_quantizer("lsq", 4, "affine", interval)
    quantizer.train(training)
    if bank is not None:
        bank.train(training)
    with pytest.raises(RuntimeError, match=r"no time step is set.*time\.at"):
        quantizer(torch.zeros(2, 3))


def test_a_part_of_a_network_called_by_itself_says_what_to_do():
    net = timed_net()
    with pytest.raises(RuntimeError, match="no time step is set"):
        net.conv_in(torch.zeros(1, 1, 8, 8))
    with net.time.at(5), torch.no_grad():
        net.conv_in(torch.zeros(1, 1, 8, 8))


def test_at_restores_what_was_set_before():
    time = TimeContext(STEPS)
    time.set(3)
    with time.at(torch.tensor([1, 2])):
        assert time.t.tolist() == [1, 2]
        with time.at(9):
            assert int(time.t) == 9
        assert time.t.tolist() == [1, 2]
    assert int(time.t) == 3


def test_at_restores_unset_and_after_an_error():
    time = TimeContext(STEPS)
    with pytest.raises(KeyError), time.at(4):
        raise KeyError("inside")
    with pytest.raises(RuntimeError):
        _ = time.t


def test_at_around_a_whole_forward_is_undone_too():
    net = timed_net()
    net.time.set(3)
    with net.time.at(7), torch.no_grad():
        net(*inputs())
    assert int(net.time.t) == 3


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (torch.tensor(0.5), r"t must be whole, not \[0\.5\].*DDIM"),
        (torch.tensor([1.0, 2.25]), r"t must be whole"),
        (torch.tensor(float("nan")), "t must be"),
        (torch.zeros(2, 2, dtype=torch.long), "integer"),
        (torch.tensor(True), "integer"),
        (torch.tensor(float(STEPS)), f"t must be from 0 to {STEPS - 1}"),
        (torch.tensor([3, -1]), f"t must be from 0 to {STEPS - 1}"),
        (torch.tensor(STEPS), f"t must be from 0 to {STEPS - 1}"),
        (-1, f"t must be from 0 to {STEPS - 1}, not -1"),
        (STEPS, "t must be from 0"),
    ],
)
def test_a_time_step_is_a_whole_number_or_a_vector_of_them(t, words):
    with pytest.raises(ValueError, match=words):
        TimeContext(STEPS).set(t)


@pytest.mark.parametrize("t", [5.0, torch.tensor(5.0), torch.tensor([5.0, 3.0]).double()])
def test_whole_numbers_held_as_floats_are_time_steps(t):
    time = TimeContext(STEPS)
    time.set(t)
    assert time.t.dtype == torch.int64
    assert time.t.tolist() == torch.as_tensor(t).long().tolist()


def test_a_refused_time_step_leaves_the_earlier_one():
    time = TimeContext(STEPS)
    time.set(3)
    with pytest.raises(ValueError):
        time.set(torch.tensor(0.5))
    assert int(time.t) == 3


@pytest.mark.parametrize("call", ["positional", "keyword", "whole_number"])
def test_the_root_forward_sets_the_time(call):
    net = timed_net()
    x, t = inputs()
    with torch.no_grad():
        if call == "positional":
            net(x, t)
        elif call == "keyword":
            net(sample=x, timestep=t)
        else:
            net(x, 17)
    assert net.time.t.tolist() == (17 if call == "whole_number" else t.tolist())


def test_time_stays_valid_through_backward():
    net = timed_net().train()
    x, t = inputs()
    loss = net(x, t, return_dict=False)[0].square().mean()
    assert net.time.t.tolist() == t.tolist()
    loss.backward()
    assert float(net.generators.weights[-1].grad.abs().max()) > 0


# --- Steps follow t alone


@pytest.mark.parametrize("interval", TIMED)
@pytest.mark.parametrize("training", [True, False])
def test_permuting_repeating_and_skipping_steps_changes_no_step_size(interval, training):
    net = timed_net(interval)
    descending = [999, 750, 500, 250, 0]
    expected = {t: found[0] for t, found in steps_seen(net, descending, training).items()}
    for times in ([0, 500, 999, 250, 750], [500, 500, 500, 0, 0], [999, 0], [250]):
        for t, found in steps_seen(net, times, training).items():
            for repeat in found:
                assert repeat == expected[t]
    changing = [name for name in expected[0] if expected[0][name] != expected[999][name]]
    assert len(changing) >= len(
        activation_quantizers(net)
    )  # or the comparison above would say nothing


@pytest.mark.parametrize("interval", TIMED)
def test_evaluations_in_between_change_no_training_step(interval):
    net = timed_net(interval)
    expected = steps_seen(net, [400], training=True)
    steps_seen(net, [1, 2, 3], training=False)
    assert steps_seen(net, [400], training=True) == expected


@pytest.mark.parametrize("interval", TIMED)
@pytest.mark.parametrize("training", [True, False])
def test_every_sample_of_a_batch_has_the_step_of_its_own_time(interval, training):
    net = timed_net(interval).train(training)
    x, t = inputs(4)
    with torch.no_grad():
        together = net(x, t)[0]
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1])[0] for i in range(4)])
        swapped = net(x, t.flip(0))[0]
    # A last bit may turn a rounding, so a few pixels may differ by a level; wrong steps would change all of them.
    assert float(((together - alone).abs() > 1e-4).float().mean()) < 0.2
    assert float(((together - swapped).abs() > 1e-4).float().mean()) > 0.9


@pytest.mark.parametrize("interval", TIMED)
def test_one_time_for_all_equals_the_same_time_for_each(interval):
    source, bank = make_interval(interval, TimeContext(STEPS))
    stir(source if bank is None else bank, 0.1)
    time = source.time if bank is None else bank.time
    with torch.no_grad():
        with time.at(412):
            one = source.step_size()
        with time.at(torch.tensor([412, 412, 3])):
            each = source.step_size()
    assert one.dim() == 0
    assert each.shape == (3,)
    assert torch.allclose(each[:2], one.expand(2), rtol=1e-6)
    assert float(each[2]) != float(one)


def test_groups_of_time_steps_have_equal_lengths_and_sharp_borders():
    time = TimeContext(1000)
    interval = PerStep(10, time)
    with torch.no_grad():
        interval.rho.copy_(torch.arange(10.0))
    table = interval.table()
    assert len(table) == 1000
    for t in (0, 99, 100, 101, 499, 500, 899, 900, 999):
        with time.at(t):
            expected = torch.nn.functional.softplus(torch.tensor(float(t // 100)))
            assert float(interval.step_size().detach()) == pytest.approx(float(expected), rel=1e-6)
            assert float(table[t]) == float(interval.step_size().detach())
    assert [int((table == value).sum()) for value in table.unique()] == [100] * 10


@pytest.mark.parametrize(("groups", "sizes"), [(1, {1000}), (3, {333, 334}), (1000, {1})])
def test_any_number_of_groups_covers_all_of_time(groups, sizes):
    interval = PerStep(groups, TimeContext(1000))
    with torch.no_grad():
        interval.rho.copy_(torch.arange(float(groups)) / 100)
    table = interval.table()
    assert {int((table == value).sum()) for value in table.unique()} == sizes
    assert len(table.unique()) == groups


@pytest.mark.parametrize("groups", [0, -1, 1001])
def test_groups_out_of_range_are_an_error_that_names_the_key(groups):
    with pytest.raises(ValueError, match=rf"tdq\.interval\.groups={groups}"):
        PerStep(groups, TimeContext(1000))


# --- Copies


@pytest.mark.parametrize("interval", TIMED)
def test_a_deep_copy_has_a_time_of_its_own(interval):
    net = timed_net(interval)
    x, t = inputs()
    with torch.no_grad():
        net(x, t)
        twin = copy.deepcopy(net)
        assert twin.time is not net.time
        twin(x, torch.tensor(5))
    assert net.time.t.tolist() == t.tolist()
    assert int(twin.time.t) == 5
    for module in twin.modules():
        if isinstance(getattr(module, "time", None), TimeContext):
            assert module.time is twin.time


def test_a_deep_copy_has_a_bank_of_its_own():
    net = timed_net()
    x, t = inputs()
    net.train()(x, t)  # leaves a matrix of step sizes with a graph behind
    twin = copy.deepcopy(net)
    rows = {name: quantizer.interval for name, quantizer in activation_quantizers(twin).items()}
    assert len(rows) > 20
    assert all(interval.bank is twin.generators for interval in rows.values())
    assert twin.generators is not net.generators
    assert twin.generators.time is twin.time
    net.eval()
    twin.eval()
    with torch.no_grad():
        before = net(x, t)[0]
        assert torch.equal(twin(x, t)[0], before)
        stir(twin.generators, 0.3)
        assert torch.equal(net(x, t)[0], before)
        assert not torch.equal(twin(x, t)[0], before)


def test_a_deep_copy_can_be_trained_and_leaves_the_original_alone():
    net = timed_net().train()
    x, t = inputs()
    net(x, t)
    twin = copy.deepcopy(net)
    twin(x, t)[0].square().mean().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert float(twin.generators.weights[0].grad.abs().max()) > 0


def test_two_networks_do_not_share_a_time():
    first, second = timed_net(), timed_net()
    with torch.no_grad():
        first(*inputs())
    with pytest.raises(RuntimeError):
        _ = second.time.t
