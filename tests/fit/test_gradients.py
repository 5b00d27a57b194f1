"""Gradients of a batch: micro-batches, computed activations, phases, and the recording on a GPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from tdq_exp.diffusion.draws import require_batch
from tdq_exp.fit.gradients import Batch, Gradients
from tdq_exp.models.recompute import recompute_activations
from tdq_exp.quant import penalty, set_final_phase
from tdq_exp.runtime.graphs import UnusableDevice, no_collection
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tests.fit.taped import Taped, record_on_tape
from tests.quant.builders import inputs, load_model, make_net, make_recipe, randn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [("lsq", "temporal"), ("pact", "temporal"), ("lsq", "static"), ("nipq", "temporal")]


@pytest.fixture(scope="module")
def nets() -> dict[tuple[str, str], nn.Module]:
    """A calibrated network of each case."""
    return {case: make_net(make_recipe(*case)) for case in CASES}


def batch(seed: int, device: str = "cpu", samples: int = 8) -> Batch:
    """(x_0, t, eps)."""
    x_0, t = inputs(samples, seed)
    t = (t + 13 * seed) % 1000
    return x_0.to(device), t.to(device), randn(*x_0.shape, seed=seed + 100).to(device)


def gradients_of(net: nn.Module, device: str, micro_batches: int = 1) -> Gradients:
    """The gradients of the model's loss with the rules' penalties."""
    model = load_model("tiny")

    def loss(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        value = model.training_loss(net, x_0, t, eps)
        extra = penalty(net)
        return value if extra is None else value + extra

    return Gradients(net, loss, Processes(cpu=device == "cpu"), micro_batches)


def found(net: nn.Module) -> list[Tensor]:
    """A copy of all gradients."""
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES[:3], ids="-".join)
def test_micro_batches_have_the_gradients_of_the_whole_batch(nets, case, device):
    whole, parts = (copy.deepcopy(nets[case]).to(device).train() for _ in range(2))
    wanted = gradients_of(whole, device)(batch(1, device))
    value = gradients_of(parts, device, micro_batches=4)(batch(1, device))

    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(found(parts), found(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_activations_that_are_computed_again_change_no_gradient(nets, case, device):
    plain, again = (copy.deepcopy(nets[case]).to(device).train() for _ in range(2))
    recompute_activations(again)
    kept: list[int] = []

    # The noise of NIPQ is drawn again as it was.
    results = []
    for net in (plain, again):
        torch.manual_seed(5)
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor

        gradients = gradients_of(net, device)
        gradients._records = False
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(gradients(batch(2, device)))
        kept.append(count[0])

    assert torch.equal(*results)
    for a, b in zip(found(again), found(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.6 * kept[0]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="launcher.recompute=true: not known to Linear"):
        recompute_activations(nn.Linear(1, 1))


def test_micro_batches_must_divide_what_a_process_computes():
    require_batch(24, 100, 2, 4)
    with pytest.raises(ValueError, match="launcher.micro_batches=5: does not divide the 12"):
        require_batch(24, 100, 2, 5)


def test_a_pass_that_can_not_be_recorded_is_launched_step_by_step_with_a_warning(nets, monkeypatch):
    net = copy.deepcopy(nets[CASES[0]]).train()
    gradients = gradients_of(net, "cpu")
    gradients._records = True

    def fail(*args: object) -> None:
        raise RuntimeError("called a synchronizing operation\nand more")

    monkeypatch.setattr("tdq_exp.fit.gradients.TrainingGraph", fail)
    with pytest.warns(UserWarning, match="one by one.*called a synchronizing operation"):
        first = gradients(batch(0)).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradients(batch(0)), first)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, UnusableDevice])
def test_what_would_fail_again_is_not_launched_step_by_step(nets, monkeypatch, error):
    gradients = gradients_of(nets[CASES[0]], "cpu")
    gradients._records = True

    def fail(*args: object) -> None:
        raise error("no more")

    monkeypatch.setattr("tdq_exp.fit.gradients.TrainingGraph", fail)
    with pytest.raises(error, match="no more"):
        gradients(batch(0))


def test_gradients_that_nobody_holds_free_their_recording(nets, monkeypatch):
    record_on_tape(monkeypatch)
    gradients = gradients_of(copy.deepcopy(nets[CASES[2]]).train(), "cpu")
    with no_collection():
        gradients(batch(0))
        assert gradients.recorded and Taped.alive
        del gradients
        assert not Taped.alive


def test_recorded_passes_on_a_cpu_are_the_same_bits(nets):
    one, other = (copy.deepcopy(nets[CASES[1]]).train() for _ in range(2))
    plain, recorded = gradients_of(one, "cpu"), gradients_of(other, "cpu")
    recorded._records = True  # a recording runs its function there
    for seed in (1, 2):
        assert torch.equal(plain(batch(seed)), recorded(batch(seed)))
        assert all(torch.equal(a, b) for a, b in zip(found(one), found(other), strict=True))


def test_processes_average_gradients_in_one_message(monkeypatch):
    processes = Processes(cpu=True)
    messages = []

    def mean(value: Tensor) -> Tensor:
        messages.append(value.clone())
        return value / 2

    monkeypatch.setattr(Processes, "world", property(lambda self: 2))
    monkeypatch.setattr(processes, "mean", mean)
    parameters = [
        nn.Parameter(torch.zeros(2, 3)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(4)),
    ]
    parameters[0].grad, parameters[2].grad = torch.ones(2, 3), torch.full((4,), 6.0)
    processes.average_gradients(parameters)

    assert [message.numel() for message in messages] == [10]
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 0.5))
    assert parameters[1].grad is None and torch.equal(parameters[2].grad, torch.full((4,), 3.0))


def test_float32_products_are_not_tf32_and_what_was_set_comes_back():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for precision, wanted in (("float32", False), ("tf32", True), ("bfloat16", False)):
        with products(precision):
            assert [flag.allow_tf32 for flag in flags] == [wanted, wanted]
    assert [flag.allow_tf32 for flag in flags] == before


# --- What only a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_network_trains_on_recorded_passes_as_on_launched_ones(nets, case, precision):
    """Phases too: NIPQ adds noise at first, of another generator state in a recording."""
    losses = []
    for records in (True, False):
        net = copy.deepcopy(nets[case]).cuda().train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        gradients = gradients_of(net, "cuda")
        gradients._records = records
        inner = gradients.loss

        def loss(*tensors: Tensor, inner: object = inner) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                return inner(*tensors)

        gradients.loss = loss
        values = []
        for update in range(12):
            if update in (0, 8):
                set_final_phase(net, update == 8)
                gradients.forget()
            with products(precision):
                values.append(gradients(batch(update, "cuda")).clone())
            optimizer.step()
        assert (gradients._graph is not None) == records
        losses.append(torch.stack(values))
    torch.testing.assert_close(*losses, rtol=5e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_recording_leaves_the_generator_where_it_was(nets):
    """A resumed training draws what the other one would have drawn."""
    results = []
    for stop in (None, 2):
        net = copy.deepcopy(nets["nipq", "temporal"]).cuda().train()
        gradients = gradients_of(net, "cuda")
        torch.cuda.manual_seed(7)
        for update in range(4):
            if update == stop:  # as if killed and started again
                state = torch.cuda.get_rng_state()
                gradients = gradients_of(net, "cuda")
                torch.cuda.manual_seed(99)
                torch.cuda.set_rng_state(state)
            value = gradients(batch(update, "cuda")).clone()
        results.append((value, found(net)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
