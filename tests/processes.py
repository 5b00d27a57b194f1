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

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = torch.multiprocessing.get_context("fork")


def start(target: Any, *arguments: Any) -> BaseProcess:
    """Start a function of this file in a process.

    Where gradients were computed beside another device, be it a GPU or a fake one of a test before,
    autograd refuses to go on in a copy of the process: there the copy becomes a new one at once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = CONTEXT.Process(target=_call, args=(target, *arguments))
    process.start()
    return process


def _call(target: Any, *arguments: Any) -> None:
    """Call a function here, or in a new Python if gradients can't be computed here."""
    try:
        torch.ones((), requires_grad=True).square().backward()
    except RuntimeError:
        _anew(target.__name__, *arguments)
    target(*arguments)


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


def collectives(cpu: bool = False, port: str | None = None) -> None:
    """Send every kind of message that a run sends, alone in its group: by NCCL on a GPU.

    One process has to find its own numbers again. It believes that it is one of several, so that
    nothing is left out.

    Args:
        cpu: without a group; a rehearsal of what is asked here.
        port: where the group meets.
    """
    from unittest import mock

    from torch import nn

    from tdq_exp.fit.ema import Ema
    from tdq_exp.fit.gradients import Gradients
    from tdq_exp.fit.weight_update import WeightUpdate
    from tdq_exp.runtime.processes import Processes

    if port is not None:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = Processes(cpu)
    device = processes.device
    if port is not None:
        assert torch.distributed.get_backend() == "nccl"
        assert device == torch.device("cuda", 0) and torch.cuda.current_device() == 0

    with mock.patch.object(Processes, "world", property(lambda self: 2)):
        # 1. Numbers on the device, and objects: errors and random states among them.
        x = torch.arange(6.0, device=device)
        assert torch.equal(processes.mean(x), x) and torch.equal(processes.sum(x), x)
        assert processes.decide(lambda: {"path": Path("a")}) == {"path": Path("a")}
        try:
            processes.decide(lambda: int("word"))
            raise AssertionError("an error was lost")
        except ValueError:
            pass

        states = processes.gather_objects(processes.random_state())[0]
        before = torch.rand(3, device=device)
        processes.set_random_state(states)
        assert torch.equal(torch.rand(3, device=device), before)
        with processes.sharing():
            processes.barrier()

        # 2. A training step: gradients recorded, averaged in one message, and the step recorded.
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(device)
        weights = [p.detach().clone() for p in net.parameters()]
        processes.share(net)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))

        optimizer = torch.optim.AdamW(net.parameters(), lr=2.0**-6, weight_decay=0.0, fused=True)
        twin = [p.detach().clone().requires_grad_() for p in net.parameters()]
        wanted = torch.optim.AdamW(twin, lr=2.0**-6, weight_decay=0.0)
        gradients = Gradients(net, lambda batch: net(batch).square().mean(), processes)
        step = WeightUpdate(net, optimizer, Ema(net, 0.5), 0.0, device)
        for update in range(4):
            gradients((torch.randn(8, 3, device=device),))
            for mine, theirs in zip(twin, net.parameters(), strict=True):
                mine.grad = theirs.grad.clone()
            step(update, 1.0, gradients.recorded)
            wanted.step()
        for mine, theirs in zip(twin, net.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert gradients.recorded is (device.type == "cuda")
        processes.barrier()

    if port is not None:
        torch.distributed.destroy_process_group()
        assert not torch.distributed.is_initialized()


def command_line(arguments: list[str], stderr: str | Path) -> None:
    """Be `python -m tdq_exp.run`, with what it says of errors in a file."""
    from tdq_exp import commands

    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(file, "w", buffering=1)
    sys.argv = ["tdq_exp", "run", *arguments]
    sys.exit(commands.main())


if __name__ == "__main__":
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
