"""Where a row was computed: commit, machine, instruction set, versions, memory."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Collection
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
COMPILER = "triton"  # of kernels for an accelerator, whose last bits depend on it; a CPU has none


@lru_cache
def environment(device: str | None = None) -> dict[str, Any]:
    """Return commit, machine and versions, for the row.

    Args:
        device: type of what computes; its model and the compiler of its kernels are named where
            it is no CPU.
    """
    on_cpu = device in (None, "cpu")
    versions: dict[str, str | None] = {}
    for package in PACKAGES if on_cpu else (*PACKAGES, COMPILER):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {os.cpu_count()} cores",
        **({} if on_cpu else {"accelerator": accelerator(str(device))}),
        "python": sys.version.split()[0],
        "instructions": instructions(),
        "versions": versions,
    }


def accelerator(device: str) -> str:
    """Return the model of the current accelerator of a type, such as `NVIDIA H100`."""
    import torch

    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return str(name()) if name is not None else device


def instructions() -> dict[str, Any]:
    """Return what the last bits of a result depend on beside the number of threads.

    `torch` is the instruction set that torch's kernels use, and `vnni` says whether the processor
    adds products of bytes in 32 bits.
    """
    import torch  # options are read without it

    flags = {"avx512_vnni", "avx_vnni"}
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "vnni": bool(flags & set(_cpuinfo("flags").split())),
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


def unknown_commits(commits: Collection[str]) -> list[str]:
    """Return those commits that the checkout's history does not hold.

    Nothing is known outside of a checkout, or in a shallow one: then none is returned.

    Args:
        commits: as `commit` returns them.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    names = sorted({name.removesuffix("+") for name in commits})
    try:
        shallow = subprocess.run(
            [*git, "rev-parse", "--is-shallow-repository"],
            capture_output=True,
            text=True,
            check=True,
        )
        if commit() is None or shallow.stdout.strip() != "false":
            return []
        asked = subprocess.run(
            [*git, "cat-file", "--batch-check"],
            input="".join(f"{name}^{{commit}}\n" for name in names),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    answers = asked.stdout.splitlines()
    return [name for name, answer in zip(names, answers, strict=True) if "missing" in answer]


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
            message = str(error).lower()
            if isinstance(error, RuntimeError) and not any(sign in message for sign in NO_MEMORY):
                raise
            raise OSError(
                "out of memory: raise launcher.micro_batches or take launcher.recompute=true, with"
                " which a training needs less, or lower fit.batch_size, fit.validation_samples,"
                f" sampler.batch or eval.batch ({(str(error).splitlines() or ['no message'])[0]})"
            ) from error

    return wrapped


def peak_memory_gb() -> float:
    """Return the largest resident size of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def peak_gpu_memory(device: str) -> dict[str, float]:
    """Return the most memory that torch held of a GPU so far, GB, by name; nothing of a CPU.

    Args:
        device: its type.
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_memory_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2)}


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16.

    Without them torch imitates each product, which took 11 times as long as float32.
    """
    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        asked = [
            getattr(torch.cpu, name, None)
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        ]
        return any(ask is not None and ask() for ask in asked)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown CPU"


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor, or nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""
