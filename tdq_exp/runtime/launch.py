"""Processes of a run: this one alone, or torch's launcher with the same command line."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch

from tdq_exp.runtime.options import LauncherOptions


def gpus() -> int:
    """Number of visible accelerators."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def device(launcher: LauncherOptions) -> torch.device:
    """Where one process of a run would compute."""
    accelerator = torch.accelerator.current_accelerator() if gpus() and not launcher.cpu else None
    return accelerator or torch.device("cpu")


def launched() -> bool:
    """Is this process one of several that torch's launcher started?"""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def wanted(launcher: LauncherOptions) -> int:
    """How many processes the configuration asks for."""
    if launcher.nproc != "auto":
        return int(launcher.nproc)
    return 1 if launcher.cpu else max(gpus(), 1)


def relaunch(count: int, arguments: list[str]) -> NoReturn:
    """Replace this process by torch's launcher, which starts `count` processes of this command."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        "-m",
        "tdq_exp.run",
    ]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command, *arguments])
