"""Finding a stage's earlier result under its fingerprint, and refusing another configuration's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdq_exp.runtime.files import Parts, fingerprint, read_json


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted({*old, *new}):
            found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    return [] if old == new else [f"{key}: {old} -> {new}"]


def check_same(
    path: Path, parts: Parts, config: Mapping[str, Any] | None = None, keep: str = "label"
) -> dict[str, Any] | None:
    """The record of a stage that was begun or done under this name, or None.

    Args:
        path: the record.
        parts: what the stage depends on now.
        config: as the record keeps it; says what changed where a part is the fingerprint of an earlier stage.
        keep: the key that would give the new result a name of its own.

    Raises:
        ValueError: if it was made by other parts; names up to four differences and says what to do.
    """
    found = read_json(path)
    if found is None or found["fingerprint"] == fingerprint(parts):
        return found
    old, new = dict(found["parts"]), json.loads(json.dumps(parts))
    config = config or {}
    for name in old.keys() & new.keys() & config.keys():
        kept, now = found["config"].get(name), json.loads(json.dumps(config[name]))
        if isinstance(old[name], str) and old[name] != new[name] and kept != now:
            old[name], new[name] = kept, now
    changed = differences(old, new)
    listed = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    raise ValueError(
        f"{path.parent} holds a result of another configuration ({listed}): set {keep}=NAME to keep both, or move it away"
    )
