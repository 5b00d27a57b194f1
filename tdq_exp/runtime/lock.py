"""Locks on folders, so that two commands never write into one at the same time.

The lock is `flock` on the file `.lock` of the folder: the kernel releases it when its process ends,
however it ends, so that a killed run leaves nothing that keeps the next one out. The file says who
holds it. It is removed at the end; one that a killed run has left is taken over.

On shared file systems: `flock` reaches other machines on NFS (version 4, or 3 with its lock
service), Lustre (mounted with `flock`), GPFS and CephFS. Where a mount keeps locks on one machine
(`nolock`, `localflock`), or has none, nobody can know for sure. Then the file decides: its holder
touches it every `BEAT` seconds, and a holder on another machine counts as alive until `SILENCE`
seconds after the last touch, by the clocks of the two machines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console

if TYPE_CHECKING:
    from tdq_exp.runtime.processes import Processes

NAME = ".lock"
BEAT = 30.0  # seconds between two signs of life
SILENCE = 180.0  # seconds after which a holder on another machine counts as dead
POLL = 1.0  # seconds between two looks at a lock that is waited for

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class InUse(BlockingIOError):
    """Somebody else holds the lock; the message says who."""


@contextmanager
def held(folder: Path, advice: str = "wait until it ends") -> Iterator[None]:
    """Hold the lock of a folder within the `with` block.

    The folder is made if need be, and removed again if nothing was written into it. A folder that
    is there and can't be written needs no lock.

    Args:
        folder: what is locked.
        advice: what the message tells the second one to do.

    Raises:
        InUse: at once, if somebody else holds it: host, process, since when.
        OSError: if the folder can't be made.
    """
    made = _make_folder(folder)
    lock = _Lock(folder / NAME)

    try:
        holder = lock.acquire()
        if holder is not None:
            raise InUse(f"{folder}: in use by {holder}; {advice}")
        yield
    finally:
        lock.release()
        for empty in reversed(made):
            with suppress(OSError):  # something was written into it, as it should be
                empty.rmdir()


@contextmanager
def waited_for(folder: Path, making: str) -> Iterator[None]:
    """Hold the lock of a folder within the `with` block, as soon as nobody else does.

    Args:
        folder: what is locked.
        making: what its holder makes, for the line that says why this one waits.
    """
    is_waiting = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(folder))
                break
            except InUse as error:
                if not is_waiting:
                    console.print(f"waiting for {making}: {error}")
                is_waiting = True
                time.sleep(POLL)
        yield


@contextmanager
def by_main(processes: Processes, lock: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a lock on the main process, for all of them within the `with` block.

    Args:
        processes: who shares the work.
        lock: `held(...)` or `waited_for(...)`; what it raises is raised on all processes.
    """
    with ExitStack() as stack:
        processes.decide(lambda: stack.enter_context(lock))
        yield


class _Lock:
    """The lock file of a folder.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: int | None = None
        self.ended = threading.Event()

    def acquire(self) -> str | None:
        """Take the lock, or return who holds it.

        Raises:
            OSError: if the file can't be made although its folder can be written.
        """
        while True:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                # Its last holder has removed the folder, which was empty.
                _make_folder(self.path.parent)
                continue
            except OSError as error:
                if error.errno in _READ_ONLY and self.path.parent.is_dir():
                    return None
                raise OSError(f"{self.path}: can't be written ({error.strerror})") from error

            # 1. The kernel's answer, where the file system has one.
            exclusive = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _describe(_read(file))
                os.close(file)
                return holder
            except OSError as error:
                exclusive = False
                if error.errno not in _UNSUPPORTED:
                    os.close(file)
                    raise OSError(f"{self.path}: can't be locked ({error.strerror})") from error

            # 2. The last holder may have removed the file between the two calls.
            if not _is_file_at(file, self.path):
                os.close(file)
                continue

            # 3. What the kernel can't know: a holder on another machine.
            found = _read(file)
            if _alive(found, os.fstat(file).st_mtime, exclusive):
                os.close(file)
                return _describe(found)

            self._take(file)
            return None

    def _take(self, file: int) -> None:
        """Write who holds the lock, and show from time to time that it is still held."""
        about = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": " ".join(sys.argv)[:200],
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)

        self.file = file
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Remove the file and give the lock back; nothing if it is not held."""
        self.ended.set()
        if self.file is None:
            return

        with suppress(OSError):
            if _is_file_at(self.file, self.path):
                self.path.unlink()
        os.close(self.file)
        self.file = None


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that were not there, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{folder}: can't be written ({reason}); {files.REMEDY}") from error
    return missing[::-1]


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> dict[str, Any]:
    """Return what a lock file says; nothing if it is empty, or was being written."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alive(found: dict[str, Any], touched: float, exclusive: bool) -> bool:
    """Return whether the holder that a lock file names still runs, as far as can be known.

    Args:
        found: what the file says.
        touched: time of its last change.
        exclusive: whether the kernel has given us the lock.
    """
    if not found:
        return False

    # On this machine the kernel knows.
    if found.get("machine") == _machine():
        return not exclusive and _runs(found.get("pid"))

    return time.time() - touched < SILENCE


def _runs(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """Return what tells this running kernel from others; containers share it, host names do not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _describe(found: dict[str, Any]) -> str:
    """Return who holds a lock, for a message."""
    if not found:
        return "another process"
    return f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}"
