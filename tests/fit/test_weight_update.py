"""The update of the weights: recorded it is the launched one, follows its schedule, and goes on from any state."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from tdq_exp.fit import weight_update
from tdq_exp.fit.checkpoint import load_state
from tdq_exp.fit.ema import Ema
from tdq_exp.fit.loop import Interrupted
from tdq_exp.fit.qat import QatTraining
from tdq_exp.fit.weight_update import WeightUpdate
from tdq_exp.runtime.graphs import Recorded, UnusableDevice, no_collection
from tests.fit.taped import Taped, record_on_tape
from tests.fit.trainings import RATE, UPDATES, training
from tests.quant.builders import make_net, make_recipe, start_quickly

CASES = [("lsq", "temporal"), ("nipq", "temporal"), ("lsq", "static")]


@pytest.fixture(scope="module")
def nets() -> dict[tuple[str, str], nn.Module]:
    """A network of each case, with start values."""
    made = {case: make_net(make_recipe(*case), calibrated=False) for case in CASES}
    for net in made.values():
        start_quickly(net)
    return made


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an optimiser keeps."""
    return [value for entry in optimizer.state.values() for value in entry.values()]


def moments(trained: QatTraining) -> list[Tensor]:
    """All that the optimiser of a training keeps."""
    return moments_of(trained.weight_update.optimizer)


def require_same(one: QatTraining, other: QatTraining, average: bool = True) -> None:
    """Compare networks and optimisers to the last bit."""
    pairs = [*zip(one.net.parameters(), other.net.parameters(), strict=True)]
    pairs += zip(moments(one), moments(other), strict=True)
    if average:
        pairs += zip(one.ema.net.parameters(), other.ema.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_recorded_update_has_the_bits_of_the_launched_one(nets, tmp_path, monkeypatch):
    """Rates, the average's weight and phases change from update to update; the recording follows."""
    case, options = CASES[1], {"grad_clip": 0.5, "weight_decay": 0.25}
    launched = training(nets[case], tmp_path / "launched", **options)
    launched.run()

    record_on_tape(monkeypatch)
    recorded = training(nets[case], tmp_path / "recorded", **options)
    recorded.run()

    phases = 2  # each has a recording of gradients, and one of the step after one that is launched
    assert Taped.replays == UPDATES + (UPDATES - phases)
    require_same(recorded, launched, average=False)
    for a, b in zip(recorded.ema.net.parameters(), launched.ema.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert recorded.weight_update.rates_by_name() == launched.weight_update.rates_by_name()


def test_what_a_recording_reads_and_writes_stays_where_it_is(nets, tmp_path, monkeypatch):
    record_on_tape(monkeypatch)
    trained = training(nets[CASES[0]], tmp_path, real_rounding=1.0)

    def places() -> list[int]:
        groups = trained.weight_update.optimizer.param_groups
        tensors = [*trained.net.parameters(), *trained.ema.net.parameters(), *moments(trained)]
        tensors += [p.grad for p in trained.net.parameters() if p.grad is not None]
        tensors += [trained.weight_update._weight, *(group["lr"] for group in groups)]
        return [tensor.data_ptr() for tensor in tensors]

    seen, rates = [], []
    for update in range(4):
        trained._update(update, trained._batch(update))
        seen.append(places())
        rates.append(float(trained.weight_update.optimizer.param_groups[0]["lr"]))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert rates == [RATE / 4, RATE / 2, 3 * RATE / 4, RATE]


def test_a_resumed_training_that_records_goes_on_with_the_same_bits(nets, tmp_path, monkeypatch):
    record_on_tape(monkeypatch)
    whole = training(nets[CASES[1]], tmp_path / "whole")
    whole.run()

    first = training(nets[CASES[1]], tmp_path / "parts", stop_after=2, validate_every=2)
    with pytest.raises(Interrupted):
        first.run()
    second = training(nets[CASES[1]], tmp_path / "parts", validate_every=100)
    second.run()
    require_same(second, whole)


@pytest.mark.parametrize("writer_records", [False, True])
def test_a_state_is_the_same_on_all_devices(nets, tmp_path, monkeypatch, writer_records):
    """Also one that was written before updates were recorded: its rates are plain numbers."""
    with monkeypatch.context() as patch:
        if writer_records:
            record_on_tape(patch)
        writer = training(nets[CASES[2]], tmp_path, stop_after=2, validate_every=2)
        with pytest.raises(Interrupted):
            writer.run()
    groups = load_state(tmp_path / "state.pt")["optimizer"]["param_groups"]
    assert [type(group["lr"]) for group in groups] == [float] * len(groups)
    assert groups[0]["lr"] == RATE / 2

    with monkeypatch.context() as patch:
        if not writer_records:
            record_on_tape(patch)
        reader = training(nets[CASES[2]], tmp_path)
        reader._restore()
    for a, b in zip(moments(reader), moments(writer), strict=True):
        assert torch.equal(a, b)
    for group in reader.weight_update.optimizer.param_groups:
        assert group["capturable"] is not writer_records
        assert isinstance(group["lr"], Tensor) is not writer_records


def test_a_step_that_waits_is_launched_singly_with_a_warning(nets, tmp_path, monkeypatch):
    launched = training(nets[CASES[2]], tmp_path / "launched")
    launched.run()

    record_on_tape(monkeypatch)
    blend = Ema.blend

    def waiting(ema: Ema, weight: Tensor) -> None:
        blend(ema, weight + 0 * weight.item())

    monkeypatch.setattr(Ema, "blend", waiting)
    trained = training(nets[CASES[2]], tmp_path / "waits")
    with pytest.warns(UserWarning, match="one by one.*called a synchronizing operation"):
        trained.run()
    require_same(trained, launched, average=False)


def test_a_recording_is_freed_before_the_next_one_and_at_the_end(nets, tmp_path, monkeypatch):
    """By itself: the collector of garbage does not know how much memory of a GPU a recording holds."""
    record_on_tape(monkeypatch)
    trained = training(nets[CASES[2]], tmp_path)
    with no_collection():
        trained.run()
        assert Taped.others == [0, 1] * 2  # that of the gradients, beside that of the step
        assert not Taped.alive and Taped.released == 4  # a GPU is waited for


def test_recordings_of_a_training_that_fails_are_freed(nets, tmp_path, monkeypatch):
    record_on_tape(monkeypatch)
    trained = training(nets[CASES[2]], tmp_path, stop_after=3)
    with no_collection():
        with pytest.raises(Interrupted):
            trained.run()
        assert not Taped.alive


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, UnusableDevice])
def test_a_step_that_can_not_be_recorded_is_launched_singly_unless_that_would_fail(
    monkeypatch, error
):
    def fail(step: Taped) -> None:
        raise error("no more\nand why")

    record_on_tape(monkeypatch)
    monkeypatch.setattr(Taped, "record", fail)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    step = WeightUpdate(net, optimizer, Ema(net, 0.5), 0.0, torch.device("cpu"))
    net(torch.ones(1, 2)).sum().backward()
    if error is not RuntimeError:
        with pytest.raises(error, match="no more"):
            step(0, 1.0, fixed=True)
        return

    with pytest.warns(UserWarning, match="optimiser's operations one by one.*no more"):
        step(0, 1.0, fixed=True)
    step(1, 1.0, fixed=True)  # without asking again
    assert not step.recorded and moments_of(optimizer)[0] == 2


def test_gradients_that_move_are_never_recorded(monkeypatch):
    record_on_tape(monkeypatch)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    step = WeightUpdate(net, optimizer, Ema(net, 0.5), 0.0, torch.device("cpu"))
    for update in range(3):
        net(torch.ones(1, 2)).sum().backward()
        step(update, 1.0, fixed=False)
        net.zero_grad()
    assert step._graph is None and Taped.replays == 0


def test_a_state_of_other_parameters_is_refused():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]
    steps = [
        WeightUpdate(
            net, torch.optim.AdamW(net.parameters()), Ema(net, 0.5), 0.0, torch.device("cpu")
        )
        for net in nets
    ]
    with pytest.raises(ValueError, match="doesn't match the size"):
        steps[0].load_state_dict(steps[1].state_dict())
    state = steps[0].state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        steps[0].load_state_dict({**state, "param_groups": state["param_groups"] * 2})


def test_the_average_by_pieces_is_the_average(monkeypatch):
    monkeypatch.setattr("tdq_exp.fit.ema.PIECE", 5)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = Ema(net, 0.9)
    assert len(ema._pieces) > 2
    before = [p.clone() for p in ema.net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p += 1
        net[2].running_mean += 1
    ema.blend(torch.tensor(0.25))
    wanted = [a + 0.25 for a in before]
    for a, b in zip(ema.net.parameters(), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(ema.net[2].running_mean, net[2].running_mean)


# --- What only a GPU has


@pytest.fixture
def same_bits_on_a_gpu():
    """Convolutions of one order of sums."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_recorded_updates_on_a_gpu_are_launched_ones(nets, case, tmp_path, same_bits_on_a_gpu):
    """The numbers of the step, where both see the same gradients."""
    results = []
    for records in (True, False):
        trained = training(nets[case], tmp_path / str(records), "cuda", grad_clip=0.5)
        trained.weight_update._records = records
        seen, close = [], trained.close

        def noted(of=trained, seen=seen, close=close) -> None:
            seen.append(of.weight_update.recorded)
            close()

        trained.close = noted
        trained.run()
        assert seen[-1] == records
        results.append(trained)
    for a, b in zip(moments(results[0]), moments(results[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for name in ("net", "ema"):
        one, other = (r.net if name == "net" else r.ema.net for r in results)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_recordings_of_a_training_on_a_gpu_are_freed(nets, tmp_path, monkeypatch):
    alive, others, record = weakref.WeakSet(), [], Recorded.record

    def counted(step: Recorded) -> None:
        others.append(len(alive))
        record(step)
        alive.add(step._graph)

    monkeypatch.setattr(Recorded, "record", counted)
    trained = training(nets[CASES[0]], tmp_path, "cuda")
    with no_collection():
        trained.run()
        assert others == [0, 1] * 2 and not alive


@pytest.mark.gpu
def test_a_training_on_a_gpu_follows_its_rates(nets, tmp_path):
    """Rates of a cosine: every update is recomputed by hand from the gradients that it saw."""
    trained = training(nets[CASES[2]], tmp_path, "cuda", warmup=2, lr_schedule="cosine")
    weight = next(p for p in trained.net.parameters() if p.dim() == 4)
    for update in range(UPDATES):
        batch = tuple(tensor.cuda() for tensor in trained._batch(update))
        before = weight.detach().clone()
        trained._update(update, batch)

        entry = trained.weight_update.optimizer.state[weight]
        step = update + 1
        m, v = entry["exp_avg"] / (1 - 0.9**step), entry["exp_avg_sq"] / (1 - 0.999**step)
        rate = RATE * trained.options.rate(update)
        wanted = before - rate * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-7)
        assert float(entry["step"]) == step
    assert trained.weight_update._graph is not None


@pytest.mark.gpu
def test_a_resumed_training_on_a_gpu_goes_on(nets, tmp_path, same_bits_on_a_gpu):
    whole = training(nets[CASES[1]], tmp_path / "whole", "cuda")
    whole.run()
    first = training(nets[CASES[1]], tmp_path / "parts", "cuda", stop_after=2, validate_every=2)
    with pytest.raises(Interrupted):
        first.run()
    second = training(nets[CASES[1]], tmp_path / "parts", "cuda")
    second.run()
    require_same(second, whole)


@pytest.mark.gpu
def test_an_update_on_a_gpu_waits_for_nothing(nets, tmp_path):
    trained = training(nets[CASES[0]], tmp_path, "cuda", real_rounding=1.0)
    batches = [tuple(tensor.cuda() for tensor in trained._batch(u)) for u in range(5)]
    for update in range(2):  # recordings are made
        trained._update(update, batches[update])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for update in range(2, 5):
            trained._update(update, batches[update])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight_update.records(torch.device("cuda"))
