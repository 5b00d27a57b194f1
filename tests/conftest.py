"""Shared fixtures: a cache of its own for every session, and a float tiny net to quantize."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A float tiny net, pre-trained for four updates."""
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment import build as jobs
    from tdq_exp.experiment import pipeline

    out = tmp_path_factory.mktemp("float")
    made = jobs.build(compose(["model=tiny", "method=fp", "fit=pretrain", "tracker=none", f"out={out}"]))
    assert pipeline.run(made) == []
    return made.folder / "weights.safetensors"


@pytest.fixture
def command(tmp_path):
    """Runs a command of the package from another folder with one thread; returns the finished process."""

    def run(*arguments: str, verb: str = "run", launcher: tuple[str, ...] = (), timeout: int = 240):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        module = ["tdq_exp.run"] if verb == "run" else ["tdq_exp", verb]
        environment.pop("HYDRA_FULL_ERROR", None)
        return subprocess.run(
            [sys.executable, *launcher, "-m", *module, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run
