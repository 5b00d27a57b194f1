"""Where a row was computed: commit, machine, versions, memory."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

NO_MEMORY = ("out of memory", "can't allocate memory")  # of torch's messages

P = ParamSpec("P")
T = TypeVar("T")

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "torch-fidelity",
    "hydra-core",
    "numpy",
    "accelerate",
)


@lru_cache
def environment() -> dict[str, Any]:
    """Return commit, machine and versions, for the row."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "versions": versions,
    }


def commit() -> str | None:
    """Return the commit of the source tree, with `+` if tracked files are modified.

    None outside of a checkout.
    """
    source = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source.parent), *args], capture_output=True, text=True, check=True
        ).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != source.parent:
            return None  # installed inside of somebody else's checkout
        dirty = git(
            "status", "--porcelain", "--untracked-files=no", "--", "tdq_exp", "configs"
        ).strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def memory_bytes() -> int:
    """Return the size of this machine's memory, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def out_of_memory_in_one_line(work: Callable[P, T]) -> Callable[P, T]:
    """Let a function that runs out of memory end in an `OSError` that says what to lower.

    torch reports memory of the CPU as a `RuntimeError`, and that of a GPU as one of its own.
    """

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            told = str(error).lower()
            if isinstance(error, RuntimeError) and not any(sign in told for sign in NO_MEMORY):
                raise
            raise OSError(
                "out of memory: lower fit.batch_size, fit.validation_samples, sampler.batch or"
                f" eval.batch ({(str(error).splitlines() or ['no message'])[0]})"
            ) from error

    return wrapped


def peak_memory_gb() -> float:
    """Return the largest resident size of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"
