"""Signals that stop a run: it keeps what it has and leaves with the exit code 128 + n.

| signal  | comes from                                                | exit code |
|---------|-----------------------------------------------------------|-----------|
| SIGHUP  | a terminal that was closed                                | 129       |
| SIGINT  | Ctrl-C                                                    | 130       |
| SIGUSR1 | SLURM, `--signal=USR1@60`                                 | 138       |
| SIGTERM | `kill`, SLURM at the end of its time, a stopped container | 143       |

A signal raises `Stopped` wherever the program is. That is safe at any point: files are replaced in
one step, and a group of images or a block counts only once it is on disk. Where a state in memory
is worth saving first, `deferred` holds the signal back, and the work asks `pending`.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
PATIENCE = 2.0  # seconds after which another signal stops at once what the first one did not

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal.

    Args:
        number: of the signal.
        kept: what was saved, for the message; empty where it is nothing special.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(number, kept)
        self.number, self.kept = number, kept

    @property
    def exit_code(self) -> int:
        """128 + n, as a shell counts it."""
        return 128 + self.number

    def __str__(self) -> str:
        kept = f", {self.kept}" if self.kept else ""
        name = signal.Signals(self.number).name
        return f"stopped by {name}{kept}: to go on, run the same command again"


class _Received:
    """What has arrived in this process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = 0.0  # seconds, monotonic
        self.deferrals = 0


_received = _Received()


@contextmanager
def handled() -> Iterator[None]:
    """Let signals raise `Stopped` within the `with` block, in the main thread.

    A signal that this process was told to ignore (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    _received.number = None
    listened = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _receive) for number in listened}

    try:
        yield
    finally:
        _received.number = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _receive(number: int, frame: FrameType | None) -> None:
    first = _received.number is None
    late = not first and time.monotonic() - _received.at > PATIENCE

    if first:
        _received.number, _received.at = number, time.monotonic()

    # A launcher passes on what a terminal has sent to all: the same signal twice is one.
    if (first and not _received.deferrals) or (late and number == signal.SIGINT):
        raise Stopped(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold signals back within the `with` block, which asks `pending` and saves what it has.

    Raises:
        Stopped: at the end of the block, for a signal that nobody has asked for. A second Ctrl-C
            stops at once.
    """
    _received.deferrals += 1
    try:
        yield
    finally:
        _received.deferrals -= 1
    check()


def pending() -> int | None:
    """Return the number of a signal that has arrived, or None."""
    return _received.number


def check() -> None:
    """Stop here if a signal has arrived and is not held back.

    An exception that is raised within a destructor or a callback of a library is lost: long work
    asks again at each of its steps.

    Raises:
        Stopped: naming the signal.
    """
    if _received.number is not None and not _received.deferrals:
        raise Stopped(_received.number)


def end_with_parent() -> None:
    """Let the end of the parent process stop this one, too: a killed launcher leaves nobody behind.

    Linux alone offers it; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
