"""Calibration sets of other projects: every format gives the same set, and nothing else is taken."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.fit.ptq.imported_set import read_set, spread_over_time
from tdq_exp.runtime.processes import Processes
from tests.quant.builders import load_model, randn

SHAPE = (1, 8, 8)
X, TIMES = randn(6, *SHAPE), torch.tensor([0, 5, 999, 3, 3, 500])
STEPWISE = (X.reshape(2, 3, *SHAPE), TIMES.reshape(2, 3))

FORMS = {
    "pair": (X, TIMES),
    "list": [X, TIMES],
    "dict": {"x": X, "t": TIMES},
    "float t": (X, TIMES.float()),
    "q-diffusion": {"xs": STEPWISE[0], "ts": STEPWISE[1]},
    "q-diffusion, lists": {"xs": list(STEPWISE[0]), "ts": list(STEPWISE[1])},
}


def saved(value, tmp_path):
    path = tmp_path / "cali.pt"
    torch.save(value, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_set(form, tmp_path):
    found = read_set(saved(FORMS[form], tmp_path), SHAPE, 1000)
    assert torch.equal(found.x, X) and torch.equal(found.t, TIMES)
    assert found.t.dtype == torch.int64
    assert found.parts() == read_set(saved((X, TIMES), tmp_path), SHAPE, 1000).parts()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((X[:, :, :4], TIMES), r"x is \[6, 1, 4, 8\].*wanted \[N, 1, 8, 8\]"),
        ((X, TIMES[:5]), r"t \[5\]"),
        ((X, TIMES + 1), "t must be whole numbers from 0 to 999"),
        ((X, TIMES - 1), "t must be whole"),
        ((X, TIMES + 0.5), "t must be whole"),
        ((X, TIMES > 3), "t is torch.bool; wanted whole numbers"),
        ((X * float("nan"), TIMES), "not finite"),
        ((X.double() * 1e300, TIMES), "not finite"),
        ((X[:1], TIMES[:1]), "holds 1 samples; wanted at least 2"),
        ((X, TIMES, TIMES), r"holds a tuple; wanted a PyTorch file of \(x, t\)"),
        ({"xs": X, "ts": TIMES, "cs": X}, "may be a condition"),
        ({"weights": X}, "a dict of weights; wanted"),
        ((X, 3), "its t is no tensor"),
        ([[X, X[:2]], TIMES], "x is"),
        (X, "holds a StoredTensor"),
    ],
)
def test_what_is_no_set_of_this_model_is_one_line(value, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        read_set(saved(value, tmp_path), SHAPE, 1000)
    assert str(caught.value).startswith("calibration.path=") and "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_nothing_in_the_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    for value in (Hostile(), (X, Hostile()), {"xs": Hostile(), "ts": TIMES}):
        with pytest.raises(ValueError, match="calibration.path="):
            read_set(saved(value, tmp_path), SHAPE, 1000)
    assert not (tmp_path / "executed").exists()


def test_a_set_is_stored_once_and_streamed_as_ours_are(tmp_path):
    processes = Processes(cpu=True)
    try:
        imported = read_set(saved((X, TIMES), tmp_path), SHAPE, 1000)
        stored = imported.stored(tmp_path, processes)
        again = imported.stored(tmp_path, processes)
    finally:
        processes.close()
    x, t, _ = again.batch(np.array([2, 0]))
    assert stored.folder == again.folder and len(again) == 6 and not again.missing()
    assert torch.equal(x, X[[2, 0]]) and t.tolist() == [999, 0]
    assert sorted(again.image().tolist()) == list(range(6))


def test_what_is_held_out_of_a_set_in_the_order_of_its_steps_is_of_all_of_them():
    steps = torch.arange(20).repeat_interleave(16)
    for t in (steps, steps.flip(0), torch.arange(20).repeat(16), steps[:201]):
        held_out = t[spread_over_time(t) >= round(0.9 * len(t))]
        assert sorted(spread_over_time(t).tolist()) == list(range(len(t)))
        counts = held_out.bincount(minlength=int(t.max()) + 1)
        assert int(counts.min()) >= 1 and int(counts.max()) <= 3


def built(path, *more):
    options = ["model=tiny", "method=ptq4dm", "launcher=cpu", "model.weights=/none", *more]
    return jobs.build(compose([*options, f"calibration.path={path}"]), source=False)


def test_a_fit_depends_on_the_files_content_and_on_nothing_that_makes_sets(tmp_path):
    def parts(path, *more):
        subject = type("Subject", (), {"model": load_model("tiny")})
        return built(path, *more).fit.set_parts(subject)

    path = saved((X, TIMES), tmp_path)
    first = parts(path)
    assert set(first) == {"version", "imported"}
    assert parts(path, "calibration.seed=3") == first
    assert parts(saved((X + 1, TIMES), tmp_path)) != first


def test_name_and_record_say_that_the_set_is_imported(tmp_path):
    job = built(saved((X, TIMES), tmp_path))
    assert job.name.endswith("_imported")
    assert job.recorded()["calibration"]["kind"] == "imported"
    again = jobs.rebuild(job.recorded(), tmp_path)  # a finished run needs no set
    assert again.name == job.name and again.fit.calibration.kind == "imported"


def test_a_missing_file_or_a_method_without_a_set_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"calibration\.path=/no\.pt: no such file"):
        built("/no.pt")
    with pytest.raises(ValueError, match=r"calibration\.kind=imported: does not go with fit"):
        built(saved((X, TIMES), tmp_path), "method=lsq")
