"""Starts the processes of a run: this one alone, or several by torch's elastic launcher.

When one of them fails, the launcher ends the others (SIGTERM, and SIGKILL after 30 seconds). Its
report is replaced by a single line.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tdq_exp.runtime import shared_error, signals
from tdq_exp.runtime.command import CommandFailed
from tdq_exp.runtime.options import LauncherOptions

TURN = 5.0  # seconds that the main process has to print an error first
LOST = 76  # exit code of a process that has lost another one, which is the cause

# What gloo and NCCL say where a process is not there any more.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "remote process exited",
)


def gpus() -> int:
    """Return the number of visible accelerators."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def device(launcher: LauncherOptions) -> torch.device:
    """Return where one process of a run would compute."""
    accelerator = torch.accelerator.current_accelerator() if gpus() and not launcher.cpu else None
    return accelerator or torch.device("cpu")


def launched() -> bool:
    """Return whether this process is one of several that torch's launcher started."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def wanted(launcher: LauncherOptions) -> int:
    """Return how many processes the configuration asks for."""
    if launcher.nproc != "auto":
        return int(launcher.nproc)
    return 1 if launcher.cpu else max(gpus(), 1)


def start(count: int, arguments: Sequence[str]) -> None:
    """Run this command in several processes, and wait for them.

    Args:
        count: how many.
        arguments: of `python -m tdq_exp.run`.

    Raises:
        CommandFailed: if one of them fails, or is killed; the others have ended, too.
        Stopped: by a signal, which they have received.
    """
    from torch.distributed import run as launcher

    options = ["--standalone", f"--nproc_per_node={count}", "-m", "tdq_exp.run", *arguments]
    parsed = launcher.parse_args(options)
    parsed.signals_to_handle = ",".join(number.name for number in signals.SIGNALS)
    sys.stdout.flush()

    with _quiet():
        try:
            launcher.run(parsed)
        except ChildFailedError as error:
            raise _failure(list(error.failures.items()), count) from error
        except SignalException as error:
            raise signals.Stopped(error.sigval) from error


def _failure(failures: list[tuple[int, ProcessFailure]], count: int) -> CommandFailed:
    """Return what the end of some processes means.

    A process that left with a code of its own has said why; one that was killed could not.
    """
    own_codes = [failure.exitcode for _, failure in failures if 0 < failure.exitcode != LOST]
    killed = [(rank, f) for rank, f in failures if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]

    if killed:
        rank, failure = killed[0]
        name = signal.Signals(-failure.exitcode).name
        return CommandFailed(
            f"process {rank} of {count} (pid {failure.pid}) was ended by {name}, and the others"
            " with it: to go on, run the same command again",
            128 - failure.exitcode,
        )
    if own_codes:
        return CommandFailed("", own_codes[0])
    return CommandFailed(
        f"a process of {count} was lost: to go on, run the same command again", LOST
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the launcher's log, and put back the handlers of signals that it replaces."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def watched() -> Iterator[None]:
    """Let this process end quietly where the launcher speaks for all, within the `with` block.

    Raises:
        CommandFailed: with the code `LOST`, if another process of this run is gone.
    """
    if not launched():
        yield
        return

    signals.end_with_parent()
    try:
        yield
    except signals.Stopped as stopped:
        shared_error.share(stopped, printed=True)
        if stopped.kept and _first():
            print(stopped.kept, file=sys.stderr, flush=True)
        raise
    except RuntimeError as error:
        if _lost_another(error):
            raise CommandFailed("", LOST) from error
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        # Where all have this error, the main one prints it, and the launcher ends the others.
        if not shared_error.is_shared(error) and not _first():
            with suppress(signals.Stopped):
                time.sleep(TURN)
                raise
            shared_error.share(error, printed=True)
        raise


def _first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _lost_another(error: RuntimeError) -> bool:
    """Return whether an error says that another process of this run is gone."""
    return isinstance(error, torch.distributed.DistError) or any(
        words in str(error) for words in _GONE
    )


def leave_together() -> None:
    """Wait for the others before leaving with an error that all processes have.

    The launcher ends the others as soon as one has left, and the main one may still have to print.
    """
    if launched() and torch.distributed.is_initialized():
        with suppress(RuntimeError):  # one that is gone needs no waiting for
            torch.distributed.barrier()
