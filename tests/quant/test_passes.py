"""Each forward pass keeps its own time step: through recomputation, in copies and in threads."""

import copy
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

from tdq_exp.quant.convert import bake
from tdq_exp.quant.intervals.base import Bank
from tdq_exp.quant.intervals.static import PerStep
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.passes import PASSES
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.time import TimeContext
from tests.quant import builders
from tests.quant.builders import make_net, make_recipe, randn, start_quickly, stir

TIMES = (torch.tensor([3, 40]), torch.tensor([700, 990]))
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["newer", "older"])
LEVEL = {
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "block_out_channels": [8],
}


def timed_net(interval="temporal", rule="lsq", **options):
    """A small network in training mode, whose step sizes differ clearly over time."""
    net = make_net(make_recipe(rule, interval, **options), calibrated=False, **LEVEL)
    start_quickly(net)
    for module in net.modules():
        if isinstance(module, PerStep | Bank):
            stir(module, 0.05 if isinstance(module, Bank) else 0.3)
    return net.train()


@pytest.fixture(scope="module")
def net():
    return timed_net()


@pytest.fixture(scope="module")
def expected(net):
    return passes(copy.deepcopy(net))


def recomputed(net, reentrant):
    """A copy of a network whose blocks are computed again in the backward pass."""

    def again(block, *args):
        return checkpoint(block, *args, use_reentrant=reentrant)

    twin = copy.deepcopy(net)
    twin.enable_gradient_checkpointing(again)
    return twin


def called(net, x, t):
    return net(x, t, return_dict=False)[0]


def passes(net, between=None, call=called):
    """Two forward passes at different time steps, and one backward pass: values and gradients."""
    torch.manual_seed(1)
    x = randn(2, 1, 8, 8).requires_grad_()
    first, second = (call(net, x, t) for t in TIMES)
    if between is not None:
        between(net)
    ((first * second).mean() + first.square().mean()).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return (first, second), gradients | {"x": x.grad}


def assert_same(found, expected):
    """The values to the bit, the gradients up to the order of sums."""
    for value, wanted in zip(found[0], expected[0], strict=True):
        assert torch.equal(value, wanted)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        near = 1e-7 + 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=near, msg=name)


# --- Blocks that are computed again


@KINDS
def test_a_block_computed_again_has_the_time_step_of_its_own_pass(net, expected, reentrant):
    assert_same(passes(recomputed(net, reentrant)), expected)
    assert any(name.startswith("generators") for name in expected[1])


@KINDS
def test_also_with_a_parameter_for_each_group_of_time_steps(reentrant):
    grouped = timed_net("per_step")
    assert_same(passes(recomputed(grouped, reentrant)), passes(grouped))


@KINDS
@pytest.mark.parametrize("rule", ["lsq", "nipq"])
def test_also_where_random_numbers_are_drawn(rule, reentrant, monkeypatch):
    dropped = TemporalIntervals(encoding=16, width=8, dropout=0.2)
    monkeypatch.setitem(builders.INTERVALS, "dropped", lambda: dropped)

    # The first quantizer lies within a block: the networks f are needed there first.
    plan = Plan(keep_float=["first", "time_embedding", "time_projection"])
    drawn = timed_net("dropped", rule, plan=plan)
    assert_same(passes(recomputed(drawn, reentrant)), passes(drawn))


@KINDS
@pytest.mark.parametrize("form", ["eval", "baked"])
def test_also_in_inference_with_gradients(net, form, reentrant):
    shipped = bake(net) if form == "baked" else copy.deepcopy(net).eval()
    again = recomputed(shipped, reentrant)
    for module in again.modules():
        module.training = hasattr(module, "gradient_checkpointing")  # or diffusers would not
    assert_same(passes(again), passes(shipped))


def another_pass(net):
    with torch.no_grad():
        net(randn(1, 1, 8, 8), torch.tensor(500))


def a_pass_in_eval(net):
    another_pass(net.eval())
    net.train()


def a_pass_of_a_copy(net):
    copy.deepcopy(net)(randn(1, 1, 8, 8), torch.tensor(500))


def a_pass_that_fails(net):
    with pytest.raises(RuntimeError):
        net(randn(1, 5, 8, 8), torch.tensor(500))


def a_pass_of_a_part(net):
    with net.time.at(5):
        net.conv_in(randn(2, 1, 8, 8))


@pytest.mark.parametrize(
    "between",
    [another_pass, a_pass_in_eval, a_pass_of_a_copy, a_pass_that_fails, a_pass_of_a_part],
)
def test_what_comes_between_forward_and_backward_changes_nothing(net, expected, between):
    assert_same(passes(recomputed(net, reentrant=False), between), expected)


@KINDS
@pytest.mark.parametrize("blocks", [None, False, True], ids=["alone", "of_newer", "of_older"])
def test_a_whole_network_is_computed_again(net, expected, reentrant, blocks):
    def call(net, x, t):
        return checkpoint(called, net, x, t, use_reentrant=reentrant)

    twin = copy.deepcopy(net) if blocks is None else recomputed(net, blocks)
    assert_same(passes(twin, call=call), expected)
    assert twin.time.t.tolist() == TIMES[1].tolist()


def test_a_part_is_computed_again_at_the_time_step_that_it_was_called_at(net):
    x = randn(2, 1, 8, 8).requires_grad_()

    def gradient(again, inside):
        def part(x, t):
            if not inside:
                return net.conv_in(x)
            with net.time.at(t):
                return net.conv_in(x)

        total = 0
        for t in TIMES[0]:
            with net.time.at(7 if inside else t):
                y = checkpoint(part, x, t, use_reentrant=False) if again else part(x, t)
            total = total + y
        net.time.set(900)
        return torch.autograd.grad(total.square().sum(), [x, net.generators.weight0])

    for inside in (False, True):
        for found, wanted in zip(gradient(True, inside), gradient(False, inside), strict=True):
            torch.testing.assert_close(found, wanted)


def compiled(net):
    net.up_blocks[0].resnets[-1].compile(backend="aot_eager", fullgraph=True, dynamic=False)
    return net


@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "output"])
@pytest.mark.parametrize(
    ("interval", "reentrant"), [("per_step", False), ("per_step", True), ("temporal", True)]
)
def test_also_where_it_is_compiled(interval, reentrant, return_dict):
    def call(net, x, t):
        return net(x, t).sample if return_dict else called(net, x, t)

    timed = timed_net(interval)
    twin = compiled(recomputed(timed, reentrant))
    assert_same(passes(twin, call=call), passes(timed))
    assert twin.time.t.tolist() == copy.deepcopy(twin.time).t.tolist() == TIMES[1].tolist()


def test_a_compiled_block_that_would_not_find_the_same_step_sizes_again_is_refused(net):
    with pytest.raises(CheckpointError, match="A different number of tensors"):
        passes(compiled(recomputed(net, reentrant=False)))


@pytest.mark.parametrize("thread", ["own", "another"])
def test_a_time_step_that_cannot_be_told_is_refused(thread):
    """Nodes of autograd are numbered by each thread for itself."""
    time, read = TimeContext(1000), []

    def block(x):
        read.append(int(time.t))
        return x.sin() * int(time.t)

    def forward(t):
        time.set(t)
        return checkpoint(block, torch.ones(1, requires_grad=True), use_reentrant=False)

    losses = [forward(3), forward(4)]
    if thread == "own":
        sum(losses).sum().backward()
        assert read == [3, 4, 4, 3]
        return

    other = threading.Thread(target=forward, args=(5,))
    other.start()
    other.join()
    with pytest.raises(RuntimeError, match=r"which time step it had can't be told.*deepcopy"):
        sum(losses).sum().backward()


def test_few_past_passes_are_kept():
    time = TimeContext(1000)
    x = torch.ones(1, requires_grad=True)
    for _ in range(3):
        with torch.no_grad():
            time.set(1)
    assert [len(passes) for passes in time.passes.of_thread.values()] == [1]
    for _ in range(PASSES + 5):
        time.set(1)
        x = x * 1
    assert [len(passes) for passes in time.passes.of_thread.values()] == [PASSES]
    assert not copy.deepcopy(time).passes.of_thread


# --- torch's own ways of calling a network


def test_a_network_is_called_with_parameters_in_place_of_its_own(net):
    moved, before = copy.deepcopy(net), called(net, randn(2, 1, 8, 8), TIMES[0])
    stir(moved, 0.01)
    given = {name: p.detach() for name, p in moved.named_parameters()}

    x = randn(2, 1, 8, 8)
    y = torch.func.functional_call(net, given, (x, TIMES[0]), {"return_dict": False})[0]
    assert torch.equal(y, called(moved, x, TIMES[0]))
    assert torch.equal(called(net, x, TIMES[0]), before)


def test_replicas_of_one_process_are_refused(net):
    """What `DataParallel` does with each module."""
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        [module._replicate_for_data_parallel() for module in net.modules()]
    assert all(module._replicate_for_data_parallel() for module in bake(net).modules())


# --- Threads


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("form", ["eval", "baked", "training"])
def test_threads_that_share_a_network_each_have_their_time_step(net, form, switching):
    shared = {"eval": copy.deepcopy(net).eval(), "baked": bake(net), "training": net}[form]
    x, times = randn(2, 1, 8, 8), [[7, 300, 999, 40], [500, 2, 800, 600]]

    def sample(net, times, found):
        with torch.no_grad():
            found += [called(net, x, torch.tensor(t)) for t in times]

    expected, found = ([], []), ([], [])
    for of_thread, into in zip(times, expected, strict=True):
        sample(copy.deepcopy(shared), of_thread, into)

    threads = [
        threading.Thread(target=sample, args=(shared, of_thread, into))
        for of_thread, into in zip(times, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for images, wanted in zip(found, expected, strict=True):
        assert len(images) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(images, wanted, strict=True))
