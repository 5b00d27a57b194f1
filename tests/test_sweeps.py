"""Sweeps: a job that fails does not keep the others from running, and what became of all is told."""

import re
import sys
from types import SimpleNamespace

import pytest

from tdq_exp import run
from tdq_exp.commands import cli, sweep
from tdq_exp.config import compose, naming
from tdq_exp.experiment.row import write_row
from tdq_exp.runtime import launch
from tdq_exp.runtime.command import CommandFailed
from tdq_exp.runtime.signals import Stopped

TINY = ["model=tiny", "method=fp", "fit=none"]


def test_the_last_value_of_a_sweep_turns_first():
    jobs = compose.sweep(["tdq=none", "bits=w8a8,w4a4", "seed=range(2)", "fit.lr=1e-3"])
    assert jobs == [
        ["tdq=none", f"bits={bits}", f"seed={seed}", "fit.lr=1e-3"]
        for bits in ("w8a8", "w4a4")
        for seed in (0, 1)
    ]


SENSELESS = ["bits=[w8a8", "fit.lr=interval(0,1)", "bits=glob(x*)", "label=/a=b.ckpt,c"]


@pytest.mark.parametrize("override", SENSELESS)
def test_a_sweep_that_makes_no_sense_is_one_line(override, monkeypatch, capsys):
    with pytest.raises(ValueError, match=rf"^{re.escape(override)}: [^\n]+$"):
        compose.sweep([override])

    # So it is on the command line.
    monkeypatch.setattr(sys, "argv", ["run", "-m", override])
    with pytest.raises(SystemExit) as ended:
        run.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: {override}") and told.count("\n") == 1


def test_a_pattern_sweeps_over_the_options_that_match_it():
    jobs = compose.sweep(["bits=glob([w8a*,w3*],exclude=[w8a8])"])
    options = ("w3a3", "w8a3", "w8a4", "w8a5", "w8a6", "w8a7")
    assert jobs == [[f"bits={option}"] for option in options]


def test_launchers_of_hydras_are_left_to_hydra():
    assert sweep.jobs_of(["-m", "seed=1,2", "hydra/launcher=joblib"]) is None
    assert sweep.jobs_of(["seed=1,2"]) is None
    assert sweep.jobs_of(["seed=1,2", "--multirun"]) == [["seed=1"], ["seed=2"]]


def test_failures_are_listed_at_the_end_with_line_and_overrides(capsys):
    ran = []

    def job(cfg, overrides):
        ran.append(cfg.seed)
        if cfg.seed == 1:
            raise ValueError("fit.lr=7: too much")
        if cfg.seed == 2:
            raise RuntimeError("out of memory\nand more")
        if cfg.seed == 3:
            raise CommandFailed("", 2)

    jobs = [[*TINY, "model.weights=x", f"seed={seed}"] for seed in (1, 2, 3, 4)]
    assert sweep.run([["model=nosuch"], *jobs], job) == 1
    assert ran == [1, 2, 3, 4]

    told = capsys.readouterr()
    summary = told.out[told.out.index("jobs of the sweep") :]
    assert summary.count("done") == 1
    assert summary.count("failed") == 4 and "model=nosuch" in summary

    listed = told.err[told.err.index("4 of 5 jobs failed:") :]
    assert "seed=1: fit.lr=7: too much\n" in listed
    assert "seed=2: RuntimeError: out of memory\n" in listed
    assert "seed=3: exit code 2, its message stands above\n" in listed
    assert "model=nosuch: " in listed and len(listed.splitlines()) == 5


def test_the_distance_of_a_job_is_of_its_own_features(tmp_path):
    """A set may have rows of several features, called otherwise than their option of `eval`."""
    cfg = compose.compose(["+experiment=digits_fp", f"out={tmp_path}", "eval.label=inception"])
    file = naming.run_folder(cfg) / naming.sample_name(cfg) / "metrics.json"
    for label, name, fid in (("lite0", "a_first_one", 1.0), ("inception", "inception-v3", 2.0)):
        row = {
            "config": {"eval": {"label": label}}, "features": {"name": name}, "images": 2,
            "metrics": {"fid": fid},
        }  # fmt: skip
        write_row(file, row)
        expected = None if label == "lite0" else "Frechet distance 2"
        assert sweep._distance(cfg, cli.Ending()) == expected


def test_a_signal_ends_the_sweep_with_its_code(capsys):
    ran = []

    def job(cfg, overrides):
        ran.append(cfg.seed)
        raise Stopped(10)

    jobs = [[*TINY, "model.weights=x", f"seed={seed}"] for seed in (1, 2)]
    assert sweep.run(jobs, job) == 138
    assert ran == [1]
    told = capsys.readouterr()
    assert "stopped" in told.out and "not begun" in told.out
    assert told.err.splitlines() == ["stopped by SIGUSR1: to go on, run the same command again"]


def failure(code):
    return SimpleNamespace(exitcode=code, pid=7)


@pytest.mark.parametrize(
    ("codes", "code", "line"),
    [
        ([2, 2], 2, ""),  # it has printed its line
        ([launch.LOST, -9], 137, "process 1 of 2 (pid 7) was ended by SIGKILL"),
        ([-15, -9], 137, "process 1 of 2 (pid 7) was ended by SIGKILL"),
        ([-11, launch.LOST], 139, "process 0 of 2 (pid 7) was ended by SIGSEGV"),
        ([143, 143], 143, ""),
        ([launch.LOST], launch.LOST, "a process of 2 was lost"),
    ],
)
def test_the_end_of_several_processes_is_one_line(codes, code, line, capsys):
    def fail():
        raise launch._failure([(rank, failure(c)) for rank, c in enumerate(codes)], 2)

    ending = cli.attempt(fail)
    told = capsys.readouterr().err
    assert ending.code == code and told.count("\n") == bool(line)
    assert told.startswith(f"error: {line}" if line else "")
