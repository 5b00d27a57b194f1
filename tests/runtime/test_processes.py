"""What processes tell each other."""

from __future__ import annotations

import socket

import pytest

from tests import processes


def test_one_process_finds_its_own_numbers_again():
    processes.collectives(cpu=True)


@pytest.mark.gpu
def test_one_process_finds_its_own_numbers_again_by_nccl():
    """A group is for the life of a process: it has one of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert processes.wait([processes.start(processes.collectives, False, port)], timeout=120) == 0
