"""The averages of lowest validation loss, on disk: a training that is killed has all it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdq_exp.fit import checkpoint, loop
from tdq_exp.fit.qat import QatTraining
from tdq_exp.runtime import tensor_files
from tests.fit.trainings import training
from tests.quant.builders import ONE_LEVEL, make_net, make_recipe, start_quickly

KEPT = 2
# Of each update, as validated: some are better than all before, some are not kept at all.
LOSSES = [5.0, 4.0, 6.0, 3.0]
BEST = [4, 2]
STATES = ("state.pt", "state.earlier.pt")


class Killed(BaseException):
    """What no code of the package catches."""


@pytest.fixture(scope="module")
def net():
    made = make_net(make_recipe("lsq", "static"), calibrated=False, **ONE_LEVEL)
    start_quickly(made)
    return made


@pytest.fixture
def losses(monkeypatch):
    """Put losses in place of those that the tiny network has."""
    found = []
    monkeypatch.setattr(QatTraining, "checkpoints", KEPT)
    monkeypatch.setattr(loop, "validation_loss", lambda *_: found.pop(0))
    monkeypatch.setattr(QatTraining, "_update", update)
    return found


@torch.no_grad()
def update(self, number, batch):
    """A quick update, which only the state says the number of."""
    for net in (self.net, self.ema.net):
        net.conv_in.layer.bias.mul_(2).add_(number)
    self._unread.append(torch.zeros(()))


@pytest.fixture
def changes(monkeypatch):
    """Count each change of a file of the training; `kill_at[0]` is the one that never happens."""
    kill_at, done, unlink = [None], [], Path.unlink

    def counted(change):
        def first(*args, **kwargs):
            if change is not unlink or args[0].name.startswith(("best-", "state.")):
                if len(done) == kill_at[0]:
                    raise Killed
                done.append(change)
            return change(*args, **kwargs)

        return first

    monkeypatch.setattr(loop, "save_weights", counted(loop.save_weights))
    write_state = counted(tensor_files.write_state)
    monkeypatch.setattr(tensor_files, "write_state", write_state)
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    return kill_at, done


def run(net, folder, losses, values=LOSSES):
    state = checkpoint.load_state(folder / "state.pt")
    losses[:] = values[0 if state is None else state["update"] :]
    _, history = training(net, folder, updates=len(LOSSES), validate_every=1).run()
    return history


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("best-*")}


def require_named(folder):
    """Each state on disk names only files that are there."""
    for name in STATES:
        state = checkpoint.load_state(folder / name)
        for _, update in state["best"] if state is not None else ():
            assert checkpoint.best_file(folder, update).exists(), (name, update)


def test_a_kill_at_any_moment_leaves_what_the_states_name(net, losses, changes, tmp_path):
    kill_at, done = changes
    history = run(net, tmp_path / "whole", losses)
    expected, count = contents(tmp_path / "whole"), len(done)
    assert sorted(expected) == ["best-0000002.safetensors", "best-0000004.safetensors"]
    assert history.facts()["best"] == BEST and count >= 10

    for kill in range(count):
        folder = tmp_path / str(kill)
        kill_at[0], done[:] = kill, []
        with pytest.raises(Killed):
            run(net, folder, losses)
        require_named(folder)

        kill_at[0] = None
        assert run(net, folder, losses).facts()["best"] == BEST
        assert contents(folder) == expected


def test_other_losses_after_a_kill_still_find_their_files(net, losses, changes, tmp_path):
    """On a GPU sums have no order, and another checkpoint may be dropped the second time."""
    kill_at, done = changes
    run(net, tmp_path / "whole", losses)
    count = len(done)

    for kill in range(count):
        folder = tmp_path / str(kill)
        kill_at[0], done[:] = kill, []
        with pytest.raises(Killed):
            run(net, folder, losses)

        # Nothing is better than what there is.
        kill_at[0] = None
        history = run(net, folder, losses, [9.0 + loss for loss in LOSSES])
        names = [checkpoint.best_file(folder, update).name for _, update in history.best]
        assert sorted(contents(folder)) == sorted(names)
