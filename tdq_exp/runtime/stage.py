"""The stages of a run: found under their fingerprint, else made, then written.

A stage has a record, one JSON file with the parts that its result depends on. Running the same
command again finds the record and does nothing; a record of other parts under the same name is
refused, with the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tdq_exp.config import records
from tdq_exp.runtime.failures import AnotherResultError
from tdq_exp.runtime.files import Parts, damaged, fingerprint, read_json, write_json
from tdq_exp.runtime.processes import Processes

Result = dict[str, Any]


class Record(Protocol):
    """Where the result of a stage is kept."""

    def find(self) -> Result | None:
        """Return the finished result, or None if there is something left to do.

        Raises:
            ValueError: if there is the result of another configuration.
        """
        ...

    def write(self, result: Result) -> None:
        """Keep a finished result."""
        ...


def stage(record: Record, make: Callable[[], Result], processes: Processes) -> tuple[Result, bool]:
    """Return the result of a stage, and whether it was made now.

    What is read or refused is decided on the main process; `make` runs on all of them, and goes on
    from whatever an interrupted run left.
    """
    # 1. Found under its fingerprint: nothing is computed.
    found = processes.decide(record.find)
    if found is not None:
        return found, False

    # 2. Made.
    made = make()

    # 3. Written, in one step.
    processes.decide(lambda: record.write(made))
    return made, True


@dataclass(frozen=True)
class StageFile:
    """A record that is a file of its own.

    Args:
        file: the JSON file.
        parts: what the result depends on.
        about: what the file says beside that, such as the name and the config.
        keep: the key that would give a changed result a name of its own, for the message.
    """

    file: Path
    parts: Parts
    about: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "label"

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the stage's parts."""
        return fingerprint(self.parts)

    def begun(self) -> Result | None:
        """Return what the file says, finished or not, or None if there is none.

        Raises:
            ValueError: if it is of another configuration.
        """
        return check_same(self.file, self.parts, self.about.get("config"), self.keep)

    def find(self) -> Result | None:
        """Return the finished result, or None; see `Record`."""
        found = self.begun()
        return found if found is not None and found.get("done") else None

    def write(self, result: Result) -> None:
        """Write the file: what it is about, its fingerprint and parts, and the result."""
        named = {"fingerprint": self.fingerprint, "parts": self.parts}
        write_json(self.file, {**self.about, **named, **result})

    def begin(self) -> Result | None:
        """Write an unfinished file if there is none; return what one said before.

        From now on the files beside it have a name, and another configuration is refused.
        """
        found = self.begun()
        if found is None:
            self.write({"done": False})
        return found


def read_record(
    path: Path, needs: Collection[str] = (), must_be_sealed: bool = False
) -> Result | None:
    """Return the record of a stage, finished or not, or None if there is none.

    Args:
        path: the record.
        needs: keys that it must have beside its fingerprint and parts.
        must_be_sealed: see `files.read_json`.

    Raises:
        ValueError: if it is damaged, or its fingerprint is not that of its parts.
    """
    found = read_json(path, ["fingerprint", "parts", *needs], must_be_sealed)
    if found is not None and not isinstance(found["parts"], dict):
        raise damaged(path, f"its parts are {found['parts']!r:.40}")
    if found is not None and found["fingerprint"] != fingerprint(found["parts"]):
        raise damaged(path, "its fingerprint is not that of its parts")
    return found


def as_recorded(value: Any) -> Any:
    """Return a value as it is read back from a record: lists for tuples, texts for keys."""
    return json.loads(json.dumps(value))


def listed(changes: Sequence[str], most: int = 4) -> str:
    """Return changes for a line of text, the first few of many."""
    rest = f"; and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + rest


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return `key: old -> new` for every leaf in which two nested values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed = []
        for name in sorted({*old, *new}):
            changed += differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else str(name)
            )
        return changed
    return [] if old == new else [f"{key}: {old} -> {new}"]


def check_same(
    path: Path, parts: Parts, config: Mapping[str, Any] | None = None, keep: str = "label"
) -> Result | None:
    """Return the record of a stage that was begun or done under this name, or None.

    Args:
        path: the record.
        parts: what the stage depends on now.
        config: as the record keeps it; says what changed where a part is the fingerprint of an
            earlier stage.
        keep: the key that would give the new result a name of its own.

    Raises:
        AnotherResultError: if it was made by other parts; names up to four differences and says
            what to do.
    """
    found = read_record(path)
    if found is None or found["fingerprint"] == fingerprint(parts):
        return found

    # An older record may say the same in other names.
    old, new = records.upgrade(found["parts"]), as_recorded(parts)
    if old == new:
        raise AnotherResultError(
            f"{path}: a record of an earlier version; bring it up to date with"
            f" python scripts/migrate_records.py {path.parent}"
        )

    # Where a part is a fingerprint, its group of the config says more.
    config, recorded = config or {}, records.upgrade(found.get("config", {}))
    for name in old.keys() & new.keys() & config.keys():
        before, now = recorded.get(name), as_recorded(config[name])
        if isinstance(old[name], str) and old[name] != new[name] and before != now:
            old[name], new[name] = before, now

    changed = listed(differences(old, new))
    raise AnotherResultError(
        f"{path.parent} holds a result of another configuration ({changed}): set {keep}=NAME to"
        " keep both, or move it away"
    )
