"""A set of images is made by one engine, and named after it, wherever it is gone on with."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.deploy import choose, integer
from tdq_exp.experiment import engines
from tdq_exp.experiment.engines import ImageSet
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes
from tests.quant.builders import load_model, make_net

without = integer.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(without is not None, reason=str(without))

GROUPS = 2
NOWHERE = "there are no integer kernels here"
SIMULATED = f"fake: {NOWHERE}"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return bake(make_net(Recipe(4, 4, Lsq, Lsq)))


class Set:
    """A set of two groups in a folder, whose engine is asked for as the sample stage does."""

    def __init__(self, folder, net: nn.Module) -> None:
        self.folder, self.net = folder, net
        self.store = ImageStore(folder / "images", GROUPS, 1, (8, 8, 1), "a set")
        self.recorded: str | None = None

    def engine(self) -> tuple[nn.Module, str]:
        images, processes = ImageSet(self.folder, self.store, self.recorded), Processes(cpu=True)
        try:
            return engines.engine(self.net, load_model("tiny"), "integer", images, processes, 0.0)
        finally:
            processes.close()

    def put(self, count: int) -> None:
        """Finish the first groups."""
        self.store.create()
        for group in range(count):
            self.store.put(group, np.zeros((1, 8, 8, 1), np.uint8))

    @property
    def file(self):
        return self.folder / engines.ENGINE


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    """Every layer is exact here, and as fast either way."""
    patch.setattr(integer, "exact_here", lambda largest, codes: True)
    patch.setattr(choose.stopwatch, "medians", lambda calls, *more: (dict.fromkeys(calls, 1.0), {}))


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """As `measure_nothing`, for every test."""
    measure_nothing(monkeypatch)


@pytest.fixture
def nowhere(monkeypatch):
    """Call it, and integers run nowhere any more."""
    return partial(monkeypatch.setattr, integer, "unavailable", lambda device: NOWHERE)


@pytest.fixture(scope="module")
def chosen(net, tmp_path_factory):
    """The folder of a set whose layers were chosen, and the name of its engine."""
    with pytest.MonkeyPatch.context() as patch:
        measure_nothing(patch)
        begun = Set(tmp_path_factory.mktemp("chosen"), net)
        running, name = begun.engine()
    assert running is not net and name.startswith("integer: ")
    return begun.folder, name


@pytest.fixture
def begun(chosen, net, tmp_path):
    """A set whose layers were chosen, without an image."""
    shutil.copytree(chosen[0], tmp_path / "set")
    return Set(tmp_path / "set", net)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
def test_images_begun_with_integers_are_not_gone_on_with_where_there_are_none(
    begun, chosen, nowhere, recorded
):
    begun.put(1)
    begun.recorded = chosen[1] if recorded else None
    nowhere()
    with pytest.raises(
        ValueError, match=f"were begun with the engine '{chosen[1]}'.*{NOWHERE}; go"
    ):
        begun.engine()
    assert begun.file.exists()


@pytest.mark.parametrize("why", ["nowhere", "inexact", "another device", "file lost"])
def test_a_finished_set_keeps_its_name_wherever_it_is_measured(
    begun, chosen, why, nowhere, monkeypatch
):
    begun.put(GROUPS)
    if why == "nowhere":
        nowhere()
    elif why == "inexact":
        monkeypatch.setattr(integer, "exact_here", lambda largest, codes: len(codes) > 8)
    elif why == "another device":
        files.write_json(begun.file, files.read_json(begun.file) | {"tiles": {}})
    else:
        begun.recorded = chosen[1]
        begun.file.unlink()
    assert begun.engine() == (begun.net, chosen[1])


def test_layers_that_became_inexact_are_named_and_the_file_is_not_called_damaged(
    begun, monkeypatch
):
    monkeypatch.setattr(integer, "exact_here", lambda largest, codes: len(codes) > 8)
    assert 0 < len(integer.candidates(begun.net)) < len(integer.codable(begun.net))
    begun.put(1)
    with pytest.raises(ValueError, match=r"engine\.json: .* ran on integers, and here") as error:
        begun.engine()
    assert integer.INEXACT in str(error.value) and "damaged" not in str(error.value)


def test_images_of_a_gpus_choice_are_not_gone_on_with_on_a_cpu(begun):
    files.write_json(begun.file, files.read_json(begun.file) | {"tiles": {}})
    begun.put(1)
    with pytest.raises(ValueError, match="were chosen on a GPU, and this is a CPU; go on where"):
        begun.engine()


def test_a_choice_without_an_image_is_made_anew_where_it_can_not_be_taken(
    begun, chosen, nowhere, monkeypatch
):
    files.write_json(begun.file, files.read_json(begun.file) | {"tiles": {}})
    assert begun.engine()[1] == chosen[1] and "tiles" not in files.read_json(begun.file)
    nowhere()
    assert begun.engine() == (begun.net, SIMULATED)
    assert not begun.file.exists(), "beside simulated images it would name another engine"


@pytest.mark.parametrize("groups", [1, GROUPS])
def test_simulated_images_are_not_gone_on_with_on_integers(begun, groups):
    begun.file.unlink()
    begun.put(groups)
    begun.recorded = SIMULATED
    if groups == GROUPS:
        assert begun.engine() == (begun.net, SIMULATED)
        return
    with pytest.raises(ValueError, match=f"'{SIMULATED}', and here layers run on integers; go on"):
        begun.engine()
    begun.recorded = None  # nothing says what they are
    with pytest.raises(ValueError, match=r"engine\.json: is missing"):
        begun.engine()


def test_another_reason_to_simulate_is_the_same_engine(begun, nowhere):
    begun.put(1)
    begun.recorded = "fake: an earlier reason"
    nowhere()
    assert begun.engine() == (begun.net, begun.recorded)


def test_a_choice_and_a_record_that_differ_are_refused(begun, chosen):
    begun.put(1)
    begun.recorded = "integer: 1 of 2 layers"
    with pytest.raises(ValueError, match=f"it says '{chosen[1]}', its images were begun with 'int"):
        begun.engine()

    begun.recorded = None
    for layers, reason in (([1], "no list of names"), (["a"], "layers that can't run")):
        files.write_json(begun.file, files.read_json(begun.file) | {"layers": layers})
        with pytest.raises(ValueError, match=rf"engine\.json: damaged \(.*{reason}"):
            begun.engine()


def test_one_process_without_integers_lets_all_simulate(net, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "gather_objects", lambda self, value: [value, NOWHERE])
    assert Set(tmp_path, net).engine() == (net, SIMULATED)
