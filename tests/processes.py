"""What a test runs in processes of its own, which begin as copies of the test's: imports cost seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as launcher

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = torch.multiprocessing.get_context("fork")
CONFIG_FROM_ARGS = launcher.config_from_args


def start(target: Any, *arguments: Any) -> BaseProcess:
    """Start a function of this file in a process.

    Where gradients were computed beside a GPU, autograd refuses to go on in a copy of the process:
    there the copy becomes a new one at once.
    """
    if torch.cuda.is_available():
        target, arguments = _anew, (target.__name__, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _anew(name: str, *arguments: Any) -> None:
    """Become a new Python that calls a function of this file."""
    os.environ["PYTHONPATH"] = str(ROOT)
    call = [sys.executable, __file__, name, json.dumps(arguments, default=str)]
    os.execv(sys.executable, call)


def wait(processes: list[BaseProcess], timeout: float = 240) -> int:
    """Wait for all; where one fails, or time is up, end the others.

    Returns:
        0, or the exit code of the first that failed.
    """
    end = time.monotonic() + timeout
    code = 0
    while not code and any(process.is_alive() for process in processes):
        processes[-1].join(0.05)
        late = -1 if time.monotonic() > end else 0
        code = next((process.exitcode for process in processes if process.exitcode), late)

    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return code or next((process.exitcode for process in processes if process.exitcode), 0)


def one_of_two(
    rank: int, ports: list[str], jobs: list[list[str]], folder: str | Path, cache: str
) -> None:
    """Be one of two processes that run jobs one after the other, as torch's launcher would start them."""
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment import build, pipeline
    from tdq_exp.quant import calibrate
    from tdq_exp.runtime import figures

    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "XDG_CACHE_HOME": cache}
    torch.set_num_threads(1)
    calibrate.KEPT = 512
    figures.intervals_over_time = figures.sample_grid = lambda *rest: None

    for port, job in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = port
        pipeline.run(build.build(compose(job)))


def command_line(arguments: list[str], stderr: str | Path) -> None:
    """Be `python -m tdq_exp.run`, with what it says of errors in a file."""
    from tdq_exp import commands

    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(file, "w", buffering=1)
    sys.argv = ["tdq_exp", "run", *arguments]
    sys.exit(commands.main())


def launched_as_copies(options: Any) -> tuple[Any, Any, list[str]]:
    """Return what torch's launcher is to start: copies of this process that run the same command.

    It takes the place of `torch.distributed.run.config_from_args`, which returns a command line.
    """
    config, python, arguments = CONFIG_FROM_ARGS(options)
    if torch.cuda.is_available():  # see `start`
        return config, python, arguments
    config.start_method = "fork"
    return config, _command, arguments[arguments.index("tdq_exp.run") + 1 :]


def _command(*arguments: str) -> None:
    """Be `python -m tdq_exp.run` and leave with its exit code."""
    from hydra.core.global_hydra import GlobalHydra

    from tdq_exp import commands

    GlobalHydra.instance().clear()  # of the process that was copied
    sys.argv = ["tdq_exp", "run", *arguments]
    code = commands.main()
    if code:
        os._exit(code)


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
