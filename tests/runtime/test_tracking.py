"""Tracking: one curve for a fit in parts, and a fit that outlives its tracker."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tdq_exp.runtime.tracking import Tracker


class Run:
    """What `wandb.init` returns; fails at the calls that are named."""

    def __init__(self, failing):
        self.failing, self.history, self.summary = failing, [], {}

    def log(self, values, step):
        if "log" in self.failing and len(self.history) == 2:
            raise ConnectionResetError("Connection lost")
        self.history.append((step, values))

    def define_metric(self, name, step_metric=None):
        pass

    def finish(self):
        if "finish" in self.failing:
            raise RuntimeError("no answer\nand more")


@pytest.fixture
def wandb(monkeypatch):
    """Stand-in for the package; keeps the runs that were begun, and what they were begun with."""
    begun = []

    def init(**options):
        if "init" in fake.failing:
            raise OSError(28, "No space left on device")
        begun.append((Run(fake.failing), options))
        return begun[-1][0]

    fake = SimpleNamespace(
        init=init,
        begun=begun,
        failing=(),
        teardown=lambda: None,
        Settings=lambda **options: options,
        Table=lambda **options: options,
        Image=lambda path: path,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def follow(folder, updates, killed=False):
    """Track a part of a fit, as a run does."""
    tracker = Tracker("offline", "project", "name", folder, {})
    for update in updates:
        tracker.log({"loss": 1 / update}, update)
    if killed:
        return
    tracker.log({"validation_loss": 0.5}, updates[-1])
    tracker.intervals({"q": torch.ones(3)})
    tracker.summary({"fid": 1.0})
    tracker.close()


@pytest.mark.parametrize(("killed", "goes_on"), [(False, 8), (True, 7)])
def test_a_fit_in_two_parts_is_one_curve_whose_steps_never_go_backwards(
    tmp_path, wandb, killed, goes_on
):
    follow(tmp_path, range(1, 8), killed)
    follow(tmp_path, range(5, 11))  # from an earlier state
    (first, one), (second, two) = wandb.begun
    assert one["id"] == two["id"] and one["resume"] == two["resume"] == "allow"

    # A step that may be incomplete is logged again, and none before it.
    assert second.history[0][0] == goes_on
    steps = [step for step, _ in (*first.history, *second.history)]
    assert steps == sorted(steps) and set(steps) == set(range(1, 11))
    assert all(values["update"] == step for step, values in first.history)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_what_wandb_raises_is_one_warning(tmp_path, wandb, failing, capsys):
    wandb.failing = (failing,)
    follow(tmp_path, range(1, 8))
    told = capsys.readouterr().out
    assert told.count("warning: wandb failed") == 1 and len(told.splitlines()) == 1
    assert len(wandb.begun) == (failing != "init")
