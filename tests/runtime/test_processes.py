"""What processes tell each other."""

from __future__ import annotations

import socket

import pytest
import torch

from tdq_exp.runtime import processes as runtime
from tests import processes


def test_threads_are_those_of_the_launcher_whatever_accelerate_gives(monkeypatch):
    """Of several processes on a CPU it gives each a share of the cores, and with it other last bits."""
    before = torch.get_num_threads()

    def accelerator(**options: object) -> None:
        torch.set_num_threads(before + 1)

    monkeypatch.setattr(runtime, "Accelerator", accelerator)
    try:
        runtime.Processes(cpu=True, threads=before)
        assert torch.get_num_threads() == before
        runtime.Processes(cpu=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_one_process_finds_its_own_numbers_again():
    processes.collectives(cpu=True)


@pytest.mark.gpu
def test_one_process_finds_its_own_numbers_again_by_nccl():
    """A group is for the life of a process: it has one of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert processes.wait([processes.start(processes.collectives, False, port)], timeout=120) == 0
