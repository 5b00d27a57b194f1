"""What all commands share: a parser made of the module's docstring, and one way to end with an error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import ParamSpec

MISTAKE = 2
INTERRUPTED = 130

P = ParamSpec("P")


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


def exit_code(command: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
    """Run a command and return its exit code.

    A user's mistake is one line, `error: ...`, and code 2; an interruption says how to go on and is
    code 130.

    Args:
        command: what it returns is the exit code if it is a number, else the code is 0.
        args, kwargs: what it is called with.
    """
    try:
        result = command(*args, **kwargs)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
