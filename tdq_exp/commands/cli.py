"""What all commands share: a parser made of a docstring, and one way to end with an error.

| exit code | meaning                                                                          |
|-----------|----------------------------------------------------------------------------------|
| 0         | done, or nothing was left to do                                                  |
| 1         | some jobs of a sweep, or cells of a table, failed; `verify` found faults; or an  |
|           | error in the program itself                                                      |
| 2         | a mistake in the command or its files, in one line; a table or figure is refused |
| 75        | another command uses the same folder: try again later                            |
| 76        | another process of the run was lost                                              |
| 128 + n   | stopped by signal n: 129 SIGHUP, 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; 137 where |
|           | one of several processes was killed                                              |
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

from tdq_exp.runtime.command import CommandFailed
from tdq_exp.runtime.shared_error import is_printed, is_shared
from tdq_exp.runtime.signals import Stopped, handled

FAILED = 1
MISTAKE = 2
IN_USE = 75  # sysexits.h calls it a temporary failure
INTERRUPTED = 130

P = ParamSpec("P")


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Args:
        code: its exit code.
        line: what it printed about that; empty if it is done, or another process printed it.
        shared: whether all processes of the run end with this error.
    """

    code: int = 0
    line: str = ""
    shared: bool = False

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it: what was to come after it is not wanted any more."""
        return self.code > 128


def parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring: its first line, then the examples.

    Args:
        doc: `__doc__` of the command's module.
        prog: the command as it is typed; argparse's guess if None.
    """
    first, _, rest = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        prog=prog,
        description=first,
        epilog=rest.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def require_results(out: Path, is_read: bool = False) -> None:
    """Refuse what is no folder of results, before anything is read or written there.

    Args:
        out: of the option `--out`.
        is_read: whether the command only shows what is there: a typo in the name would show an
            empty table.

    Raises:
        ValueError: naming the option.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out}: is no folder; name the folder of results")
    if is_read and not out.exists():
        raise ValueError(f"--out={out}: no such folder; name the folder of results")


def exit_code(command: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
    """Run a command and return its exit code; see `attempt`.

    Signals stop the command; see `runtime.signals`.
    """
    with handled():
        return attempt(command, *args, **kwargs).code


def attempt(command: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Ending:
    """Run a command and return how it ended.

    A user's mistake is printed as one line, `error: ...`; an interruption says how to go on.

    Args:
        command: what it returns is the exit code if it is a number, else the code is 0.
        args, kwargs: what it is called with.
    """
    try:
        result = command(*args, **kwargs)
        return Ending(result if isinstance(result, int) else 0)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(INTERRUPTED - 128)
        return _printed(error, Ending(stopped.exit_code, str(stopped)))
    except CommandFailed as error:
        return _printed(error, Ending(error.code, _one_line(error) if str(error) else ""))
    except BlockingIOError as error:
        return _printed(error, Ending(IN_USE, _one_line(error), is_shared(error)))
    except (ValueError, OSError, FloatingPointError) as error:  # InterruptedError is an OSError
        return _printed(error, Ending(MISTAKE, _one_line(error), is_shared(error)))


def _one_line(error: BaseException) -> str:
    """Return the line of an error; names and values in it may have breaks of their own."""
    return "error: " + " ".join(line.strip() for line in str(error).splitlines())


def _printed(error: BaseException, ending: Ending) -> Ending:
    """Print the line of an ending, unless another process prints it."""
    if ending.line and not is_printed(error):
        print(ending.line, file=sys.stderr, flush=True)
    return ending
