"""Training states on disk, of which the last two are kept, and the best averages.

`state.pt` holds all that the next update depends on: network, average, optimiser, and the random
state of dropout for each process. Draws of data need no state (see `diffusion.objective`). The
state before it is kept as `state.earlier.pt`: a damaged one costs the updates since then.

A state names the averages of lowest validation loss, which are files of their own, `best-*`. One
that is no longer among them stays until no state names it (`States`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tdq_exp.runtime import tensor_files
from tdq_exp.runtime.progress import console


def save_state(path: Path, state: dict[str, Any], keep_earlier: bool = False) -> None:
    """Replace the state file in one step: a kill at any moment leaves the old one or the new one.

    Args:
        path: the file.
        state: tensors and plain values.
        keep_earlier: keep the old one under `earlier_file(path)`.

    Raises:
        OSError: if the folder can't be written or is full; the old file is untouched then.
    """
    if keep_earlier and path.exists():
        # A second name for the old file, which stays in place until the new one is whole.
        earlier = earlier_file(path)
        earlier.unlink(missing_ok=True)
        with suppress(OSError):  # a file system without hard links keeps one state
            os.link(path, earlier)

    tensor_files.write_state(path, state)


def whole_state(path: Path) -> Path | None:
    """Return the file of the last state that is whole, or None; the main process asks.

    A damaged file is removed; a line says so.
    """
    for file in (path, earlier_file(path)):
        try:
            if file.exists() and (tensor_files.check_state(file) or tensor_files.read_state(file)):
                return file
        except ValueError as error:
            console.print(
                f"{str(error).partition(';')[0]}: the fit goes on from an earlier state, or from"
                " its beginning",
            )
            file.unlink()
    return None


# Options that a training can't change on its way, as its state names them, and what a state that
# lacks one was made with.
FIXED = {"micro_batches": 1, "compile": False}


def state_of_fit(
    path: Path, fingerprint: str, world: int, fixed: Mapping[str, object]
) -> Path | None:
    """Return the file of the last whole state, or None; refuse one that can't go on here.

    Args:
        path: where states are written.
        fingerprint: of the fit.
        world: number of processes.
        fixed: the values of `FIXED`, of group `launcher`.

    Raises:
        ValueError: if the state is of another fit, or was begun with other numbers.
    """
    file = whole_state(path)
    state = load_state(file) if file is not None else None
    if state is None:
        return None

    if state.get("fingerprint") != fingerprint:
        raise ValueError(f"{path}: the training state of another fit; remove it to start this one")

    with tensor_files.values_of(path):
        begun_with = len(state["random"])
    if begun_with != world:
        raise ValueError(
            f"{path}: begun with {begun_with} processes, now {world}; use"
            f" launcher.nproc={begun_with} or remove the file to start again"
        )

    for name, usual in FIXED.items():
        then, now = _word(state.get(name, usual)), _word(fixed[name])
        if then != now:
            raise ValueError(
                f"{path}: begun with launcher.{name}={then}, now {now}; set it so, or remove the"
                " file to start again"
            )

    return file


def _word(value: object) -> str:
    """Return a value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def load_state(path: Path) -> dict[str, Any] | None:
    """Return the state, on the CPU, or None if there is none yet.

    Raises:
        ValueError: if the file is damaged.
    """
    return tensor_files.read_state(path)


def earlier_file(path: Path) -> Path:
    """Return where the state before the last one is kept."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def remove_earlier(path: Path) -> None:
    """Remove the state before the last one: a finished fit needs none."""
    earlier_file(path).unlink(missing_ok=True)


def best_file(folder: Path, update: int) -> Path:
    """Return the file of the average after an update, if it was one of the best."""
    return folder / f"best-{update:07d}.safetensors"


class States:
    """The states of one training, and the averages that they name; the main process writes.

    A kill at any moment leaves states that name only files that are there.

    Args:
        file: the last state's.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.dropped: set[int] = set()  # updates that are not among the best, but may have a file
        self.named: set[int] = set()  # by the state that was written or read last

    def restored(self, update: int, named: Collection[int]) -> None:
        """Note what a state names, and which files an interrupted run left beside them.

        Args:
            update: of the state; files of later ones are written or dropped once more.
            named: updates of the averages that it names.
        """
        numbers = [path.stem.partition("-")[2] for path in self.file.parent.glob("best-*")]
        found = {int(number) for number in numbers if number.isdecimal()}
        self.named = set(named)
        self.dropped = {one for one in found if one <= update} - self.named

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, then remove the averages that neither it nor the one before it names."""
        save_state(self.file, state, keep_earlier=True)
        now = {update for _, update in state["best"]}
        self._remove_but(self.named | now)
        self.named = now

    def finish(self) -> None:
        """Leave the last state alone, and the averages that it names."""
        remove_earlier(self.file)
        self._remove_but(self.named)

    def _remove_but(self, named: set[int]) -> None:
        for update in sorted(self.dropped - named):
            best_file(self.file.parent, update).unlink(missing_ok=True)
        self.dropped &= named
