"""Start another command and wait for it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from tdq_exp.runtime.signals import Stopped

PATIENCE = 40.0  # seconds that a stopped command gets to end: it waits for processes of its own


class CommandFailed(RuntimeError):
    """A command that was started has failed.

    Args:
        line: what to say; empty if the command has said it.
        code: its exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def call(command: Sequence[str]) -> int:
    """Run a command with this terminal's input and output, and return its exit code.

    A command is not left behind when this process is stopped: it receives the same signal, and ends
    before this process does.
    """
    process = subprocess.Popen(command)

    try:
        return process.wait()
    except BaseException as error:
        # The terminal sends Ctrl-C to the command as well.
        if not isinstance(error, KeyboardInterrupt):
            process.terminate()
        elif isinstance(error, Stopped) and error.number != signal.SIGINT:
            process.send_signal(error.number)

        try:
            process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.terminate()
            process.wait()
        raise
