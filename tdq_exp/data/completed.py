"""Arrays that several processes fill together, once, whoever asks for them first.

No group depends on another one: the files are the same bits for any number of processes, and after
any interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from numpy.typing import NDArray

from tdq_exp.data.arrays import GroupedArrays
from tdq_exp.runtime import lock
from tdq_exp.runtime.processes import Processes
from tdq_exp.runtime.progress import track

Rows = Mapping[str, NDArray]


def complete(
    arrays: GroupedArrays,
    batches: Sequence[range],
    make: Callable[[range], Rows],
    processes: Processes,
    *,
    title: str,
    making: str | None,
) -> None:
    """Make the groups that are missing, each process its share of them.

    Args:
        arrays: begun.
        batches: numbers of the images that each group is of.
        make: the numbers of a group's images -> name of an array -> its rows.
        processes: who shares the work.
        title: of the progress bar.
        making: what is made, for another run that asks for the same and waits meanwhile; None if
            nobody else fills these arrays.

    Raises:
        OSError: on all processes, if one of them can't write, or the lock can't be had.
    """
    with ExitStack() as stack:
        if making is not None and processes.decide(arrays.missing):
            waiting = lock.waited_for(arrays.folder, making)
            stack.enter_context(lock.by_main(processes, waiting))
        _fill(arrays, batches, make, processes, title)


def _fill(
    arrays: GroupedArrays,
    batches: Sequence[range],
    make: Callable[[range], Rows],
    processes: Processes,
    title: str,
) -> None:
    """Make what is missing still: another run may have made some of it meanwhile."""
    missing = processes.decide(arrays.missing)
    done = arrays.groups - len(missing)
    shown = processes.main and bool(missing)

    with processes.sharing(), track(title, arrays.groups, done, show=shown) as advance:
        for group in missing[processes.rank :: processes.world]:
            arrays.put(group, **make(batches[group]))
            advance(f"{batches[group].stop} images")
