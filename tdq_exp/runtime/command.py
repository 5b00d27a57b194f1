"""Start another command and wait for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

PATIENCE = 30.0  # seconds that a stopped command gets to end its processes


def call(command: Sequence[str]) -> int:
    """Run a command with this terminal's input and output, and return its exit code.

    A command is not left behind when this process is stopped: it ends before this process does.
    """
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    process = subprocess.Popen(command)

    try:
        return process.wait()
    except BaseException as error:
        # The terminal sends Ctrl-C to the command as well.
        if not isinstance(error, KeyboardInterrupt):
            process.terminate()

        try:
            process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.terminate()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
