"""Rows, and the fingerprints that say what they are rows of.

A fingerprint is the hash of *parts*: the plain values that a stage's result depends on. Stages build on each other,
fit < sample < measure, and the upstream fingerprint is one of the downstream parts. Paths are never parts: the hash of
what they hold is. The same fingerprint means "already done"; another one under the same name is refused, with the
difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]
PACKAGES = ("torch", "torchvision", "diffusers", "torch-fidelity", "hydra-core", "numpy", "accelerate")


def fingerprint(parts: Parts) -> str:
    """First 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted({*old, *new}):
            found += differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return found
    return [] if old == new else [f"{key}: {old} -> {new}"]


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to do this stage again") from error


def write(path: Path, content: Any) -> None:
    """Writes JSON beside the target and renames it.

    Raises:
        OSError: naming the file, if the folder can't be written or is full.
    """
    part = path.with_suffix(f"{path.suffix}.{os.getpid()}.part")  # caches are shared by runs that go on side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror}); free space or set out=FOLDER") from error


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
    found = read(path)
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


@lru_cache
def environment() -> dict[str, Any]:
    """Commit, machine and versions, for the row."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "versions": versions,
    }


def commit() -> str | None:
    """Commit of the source tree, `+` appended if tracked files are modified; None outside of a checkout."""
    source = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source.parent), *args], capture_output=True, text=True, check=True
        ).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != source.parent:
            return None  # installed inside of somebody else's checkout
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "tdq_exp", "configs").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"
