"""The learning rates of the training loop, and the blocks that it compiles."""

from __future__ import annotations

import pytest
import torch

from tdq_exp.config.setting import check
from tdq_exp.fit import loop
from tdq_exp.fit.checkpoint import load_state, save_state
from tdq_exp.fit.options import TrainOptions
from tests.fit.trainings import training
from tests.quant.builders import make_net, make_recipe, start_quickly


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_cosine_is_torchs_after_a_linear_warm_up(warmup):
    options = TrainOptions(updates=40, batch_size=1, warmup=warmup, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40 - warmup)
    for update in range(40):
        if update < warmup:
            assert options.rate(update) == (update + 1) / warmup
            continue
        assert options.rate(update) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        oracle.step()


def test_a_constant_rate_stays_after_the_warm_up():
    options = TrainOptions(updates=10, batch_size=1, warmup=4)
    assert [options.rate(update) for update in range(10)] == [0.25, 0.5, 0.75, *[1.0] * 7]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="fit.lr_schedule='linear': choose constant or cosine"):
        check(TrainOptions(updates=10, batch_size=1, lr_schedule="linear"), "fit")


class Trials:
    """In place of compiled blocks: runs what it is to compile on, and changes nothing."""

    active = True

    def __init__(self, net):
        self.trials = 0

    def try_out(self, run):
        run()
        self.trials += 1


def test_compiling_draws_and_changes_nothing(tmp_path, monkeypatch):
    """It is tried in each phase of a training; noise is drawn as if it had not been."""
    monkeypatch.setattr(loop, "CompiledBlocks", Trials)
    net = make_net(make_recipe("nipq", "static"), calibrated=False)
    start_quickly(net)
    plain = training(net, tmp_path / "plain")
    compiled = training(net, tmp_path / "compiled", compiled=True)
    (_, one), (_, other) = plain.run(), compiled.run()

    assert compiled.compiled.trials == 2
    assert one.validation == other.validation
    pairs = zip(plain.net.parameters(), compiled.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert other.facts()["compiled"] is True and "compiled" not in one.facts()


class OnlyFirst(Trials):
    """Compiles in the first phase that it sees, if in any."""

    phases = 1

    def try_out(self, run):
        run()
        self.trials += 1
        self.active = self.trials <= self.phases


def test_a_row_says_that_a_part_of_the_training_was_compiled(tmp_path, monkeypatch):
    """Another part may not compile: the later phase, or what a killed run goes on with."""
    monkeypatch.setattr(loop, "CompiledBlocks", OnlyFirst)
    net = make_net(make_recipe("lsq", "static"), calibrated=False)
    start_quickly(net)
    numbers = {"compiled": True, "validate_every": 3, "real_rounding": 0.7}
    first = training(net, tmp_path, stop_after=3, **numbers)
    with pytest.raises(loop.Interrupted):
        first.run()
    assert first.compiled.trials == 2 and not first.compiled.active
    state = load_state(tmp_path / "state.pt")

    monkeypatch.setattr(OnlyFirst, "phases", 0)
    _, history = training(net, tmp_path, **numbers).run()
    assert history.compiled and history.facts()["compiled"] is True

    # A state that was written before it said so.
    del state["compiled"]
    save_state(tmp_path / "state.pt", state)
    older = training(net, tmp_path, **numbers)
    assert older._restore() == 3 and not older.history.compiled
