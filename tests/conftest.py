"""Shared fixtures: a cache of its own for every session, and a float tiny net to quantize."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import processes

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module", autouse=True)
def _no_old_garbage():
    """Every run collects garbage at its end; this keeps it from looking through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _small_charts():
    """Charts of every run at a quarter of their resolution: drawing them takes longer than a tiny fit."""
    from tdq_exp.runtime import figures

    before, figures.RESOLUTION = figures.RESOLUTION, figures.RESOLUTION // 4
    yield
    figures.RESOLUTION = before


@pytest.fixture(scope="session", autouse=True)
def _step_sizes_drawn_once():
    """A run's chart of step sizes is drawn once with curves and once with bars; other runs get a copy.

    What it shows has tests of its own, which call the function itself.
    """
    from tdq_exp.experiment import fit_stage
    from tdq_exp.runtime import figures

    drawn = {}

    def intervals_over_time(tables, path, title):
        draw, timed = figures.intervals_over_time, any(len(s) > 1 for s, _ in tables.values())
        if (draw, timed) not in drawn:
            draw(tables, path, title)
            both = [path, path.with_suffix(".svg")]
            drawn[draw, timed] = [(p.suffix, p.read_bytes()) for p in both if p.exists()]
        for suffix, content in drawn[draw, timed]:
            path.with_suffix(suffix).write_bytes(content)

    class Figures:
        def __getattr__(self, name):
            return intervals_over_time if name == "intervals_over_time" else getattr(figures, name)

    fit_stage.figures = Figures()
    yield
    fit_stage.figures = figures


@pytest.fixture(scope="session", autouse=True)
def _interpolations_parsed_once():
    """OmegaConf parses `${a.b}` anew for each node that has it, a tenth of the time of composing."""
    from omegaconf import base, grammar_parser

    before = grammar_parser.parse
    base.parse = grammar_parser.parse = functools.lru_cache(4096)(before)
    yield
    base.parse = grammar_parser.parse = before


@pytest.fixture
def few_start_values(monkeypatch):
    """Calibrates on fewer values: the search for start values takes longer than fitting a tiny net."""
    from tdq_exp.quant import calibrate

    monkeypatch.setattr(calibrate, "KEPT", 512)


@pytest.fixture(scope="module")
def few_start_values_of_a_module():
    """The same for all fits of a file, those of its fixtures among them."""
    from tdq_exp.quant import calibrate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "KEPT", 512)
        yield


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A float tiny net, pre-trained for four updates."""
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment import build as jobs
    from tdq_exp.experiment import pipeline

    out = tmp_path_factory.mktemp("float")
    made = jobs.build(
        compose(["model=tiny", "method=fp", "fit=pretrain", "tracker=none", f"out={out}"])
    )
    assert pipeline.run(made) == []
    return made.folder / "weights.safetensors"


@pytest.fixture
def command(tmp_path):
    """Runs a command of the package as a process, from another folder, with one thread; returns the finished process."""

    def run(*arguments: str, verb: str = "run", launcher: tuple[str, ...] = (), timeout: int = 240):
        module = ["tdq_exp.run"] if verb == "run" else ["tdq_exp", verb]
        return _process([*launcher, "-m", *module, *arguments], tmp_path, timeout)

    return run


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """Runs a command of the package within this process; returns its exit code and what it printed.

    Starting a process costs five seconds, most of them imports. `command` proves that a verb starts; this, what it does.
    """

    def run(*arguments: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
        from hydra.core.global_hydra import GlobalHydra

        from tdq_exp import commands

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tdq_exp", verb, *arguments])
        capsys.readouterr()
        try:
            code = commands.main()
        except SystemExit as error:
            code = error.code
        finally:
            GlobalHydra.instance().clear()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess([verb, *arguments], code, printed.out, printed.err)

    return run


@pytest.fixture
def together(tmp_path):
    """Runs jobs, with `--` between them, in two processes with gloo between these; returns 0, or an exit code.

    They begin as copies of this process, with few start values (see `few_start_values`, which a
    test wants beside this) and without figures. What they print is among what the test printed.
    """

    def run(*arguments: str) -> int:
        jobs = [[]]
        for argument in arguments:
            if argument == "--":
                jobs.append([])
            else:
                jobs[-1].append(argument)

        ports, cache = _free_ports(len(jobs)), os.environ["XDG_CACHE_HOME"]
        return processes.wait(
            [processes.start(processes.one_of_two, r, ports, jobs, tmp_path, cache) for r in (0, 1)]
        )

    return run


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [str(free.getsockname()[1]) for free in sockets]


def _process(
    arguments: list[str], folder: Path, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_SILENT": "true",
    }
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def operators_listed_once():
    """Torch's exporter lists all operators anew for every graph, a third of the time of exporting a layer."""
    pytest.importorskip("onnxscript", reason="export is an optional extra")
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listing, kept = ONNXRegistry.from_torchlib, {}

    def from_torchlib(opset_version=None):
        arguments = () if opset_version is None else (opset_version,)
        if arguments not in kept:
            kept[arguments] = listing(*arguments)
        mine = copy.copy(kept[arguments])
        mine.functions = {target: list(found) for target, found in mine.functions.items()}
        return mine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
