"""Files of a run: JSON, fingerprints, seals, and the one way in which a file is replaced.

A fingerprint is the hash of *parts*: the plain values that a stage's result depends on. Stages
build on each other, fit < sample < measure, and the upstream fingerprint is one of the downstream
parts. Paths are never parts: the hash of what they hold is. The same fingerprint means "already
done"; another one under the same name is refused, with the difference.

A seal is the hash of a JSON object's whole content, kept in the object under `seal`. It is checked
whenever a file is read, so that a changed number is refused instead of being used. Tensors have
their checksums in `tensor_files`, arrays in `data.arrays`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]

REMEDY = "free space or set out=FOLDER"
ABANDONED = 24 * 3600.0  # seconds after which a part file belongs to no living run
JSON_COLUMNS = 400  # of a line of a record
SEAL = "seal"
NO_SEAL = "has no seal; an earlier version wrote none: python scripts/migrate_records.py"
_SEAL_VALUE = re.compile(r"sha256:[0-9a-f]{16}")


def fingerprint(parts: Parts) -> str:
    """Return the first 16 hex digits of the SHA-256 of the parts as canonical JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sealed(content: Parts) -> dict[str, Any]:
    """Return a JSON object with its seal, in place of an older one."""
    read_back = json.loads(json.dumps(content))  # keys are texts then, and tuples lists
    plain = {key: value for key, value in read_back.items() if key != SEAL}
    return {**plain, SEAL: f"sha256:{fingerprint(plain)}"}


def seal_fault(content: Parts) -> str | None:
    """Return what is wrong with the seal of a JSON object, or None if it is right.

    A damaged name of the key does not make a sealed object an unsealed one: a seal's value shows
    under any key.
    """
    if SEAL in content:
        right = content[SEAL] == sealed(content)[SEAL]
        return None if right else "its content does not match its seal"

    values = [value for value in content.values() if isinstance(value, str)]
    if any(_SEAL_VALUE.fullmatch(value) for value in values):
        return "the name of its seal is damaged"
    return NO_SEAL


@contextmanager
def replacing(path: Path, remedy: str = REMEDY, keep_other: bool = False) -> Iterator[Path]:
    """Write a file beside its target and rename it: a reader finds the whole file or none.

    After an error the target is as it was, and nothing is left beside it.

    Args:
        path: the target; its folder is made if need be.
        remedy: what the message of an error says to do.
        keep_other: if the target exists by the time the new file is finished, keep the target.

    Yields:
        The file to write. Its name is unique, so that runs beside this one can write the same
        target.

    Raises:
        OSError: naming the target, if the folder can't be written or is full.
    """
    part = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)

        yield part

        if not (keep_other and path.exists()):
            os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise OSError(f"{path}: can't be written ({reason}); {remedy}") from error
    finally:
        with suppress(OSError):  # where there is no folder, there is nothing to remove
            part.unlink(missing_ok=True)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Give a folder of one's own beside a target, and remove it at the end.

    Folders that killed processes left there are removed, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)

    part = _part_of(path)
    part.mkdir(mode=0o700)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the part files and folders that killed processes left anywhere below a folder."""
    for part in list(folder.rglob(".*.part")):
        _remove_if_abandoned(part)


def _part_of(path: Path) -> Path:
    """Return a unique name beside a target, which says who writes it: host and process."""
    host = re.sub(r"\W", "_", os.uname().nodename)
    return path.with_name(f".{path.name}.{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _remove_abandoned(path: Path) -> None:
    """Remove what killed runs left beside a target."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        _remove_if_abandoned(part)


def _remove_if_abandoned(part: Path) -> None:
    """Remove a part file or folder whose process has ended, or that nobody wrote to for a day.

    Whether a process lives is known on this host only; elsewhere, age decides.
    """
    with suppress(OSError):  # another run removes it, too
        old = time.time() - part.stat().st_mtime > ABANDONED
        if old or _writer_has_ended(part):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()


def _writer_has_ended(part: Path) -> bool:
    named = re.fullmatch(r"\..+\.(\w*)-(\d+)-[0-9a-f]{8}\.part", part.name)
    if named is None or named[1] != re.sub(r"\W", "_", os.uname().nodename):
        return False
    try:
        os.kill(int(named[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is another user's
        return False
    return False


def require_regular(path: Path) -> None:
    """Refuse to read what is there but is no file: a pipe would wait for ever, a device never end.

    Raises:
        ValueError: naming the path. What is missing is left to whoever opens it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
            raise ValueError(f"{path}: is {kind}, where a file is wanted")


def require_folder(path: Path, key: str) -> None:
    """Refuse a folder that can't be made: something else has its name, or it can't be written to.

    Nothing is made.

    Args:
        path: the folder.
        key: of the configuration, for the message.

    Raises:
        OSError: naming key and path.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent

    if not there.is_dir():
        raise OSError(f"{key}={path}: {there} is no folder; name another")
    try:
        tempfile.TemporaryFile(dir=there).close()  # it has no name: nothing is left
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(
            f"{key}={path}: {there} can't be written to ({reason}); name another folder"
        ) from error


def write_bytes(path: Path, content: bytes, remedy: str = REMEDY) -> None:
    """Replace a file in one step. See `replacing`."""
    with replacing(path, remedy) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str, remedy: str = REMEDY) -> None:
    """Replace a text file, UTF-8, in one step. See `replacing`."""
    write_bytes(path, content.encode(), remedy)


def copy(source: Path, target: Path, remedy: str = REMEDY) -> None:
    """Replace a file by a copy of another one in one step. See `replacing`."""
    with replacing(target, remedy) as part:
        shutil.copyfile(source, part)


def json_text(value: Any, indent: str = "", used: int = 0) -> str:
    """Return a value as JSON with sorted keys, in lines.

    A list or an object that fits into a line stands on one; any other has a line for each of its
    values. Records are half as long as with a line for every number, and a `diff` of two still
    shows which part of them differs.

    Args:
        value: plain.
        indent: what its line begins with.
        used: columns of the line that its key takes.
    """
    line = json.dumps(value, sort_keys=True, separators=(",", ":"))
    fits = len(indent) + used + len(line) <= JSON_COLUMNS
    if fits or not value or not isinstance(value, dict | list):
        return line

    is_object = isinstance(value, dict)
    keys = [f"{json.dumps(key)}:" for key in sorted(value)] if is_object else [""] * len(value)
    values = [value[key] for key in sorted(value)] if is_object else value
    inner = f"{indent} "
    lines = [
        f"{inner}{key}{json_text(of, inner, len(key))}"
        for key, of in zip(keys, values, strict=True)
    ]

    first, last = ("{", "}") if is_object else ("[", "]")
    return "\n".join((first, ",\n".join(lines), f"{indent}{last}"))


def write_json(path: Path, content: Parts, remedy: str = REMEDY) -> None:
    """Replace a JSON file in one step, its keys sorted, with a seal. See `replacing`.

    A file that says the same already is left alone.
    """
    text = json_text(sealed(content)) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text, remedy)


def read_json(
    path: Path, needs: Collection[str] = (), must_be_sealed: bool = False
) -> dict[str, Any] | None:
    """Return the content of a JSON file without its seal, or None if there is no file.

    Args:
        path: the file.
        needs: keys that it must have.
        must_be_sealed: refuse a file without a seal, which an earlier version may have written.

    Raises:
        ValueError: if it is damaged.
    """
    require_regular(path)
    try:
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets without end
        raise damaged(path, str(error)) from error

    if not isinstance(content, dict):
        raise damaged(path, f"a {type(content).__name__} in place of an object")

    if not content:
        raise damaged(path, "it is empty")
    require_seal(path, content, must_be_sealed)

    if missing := [key for key in needs if key not in content]:
        raise damaged(path, f"it has no {', '.join(missing)}")
    return {key: value for key, value in content.items() if key != SEAL}


def require_seal(path: Path, content: Parts, must_be_sealed: bool = True) -> None:
    """Refuse a JSON object that does not match its seal.

    Args:
        path: the file that holds it, for the message.
        content: the object.
        must_be_sealed: refuse an object without a seal, too.

    Raises:
        ValueError: naming the file.
    """
    fault = seal_fault(content)
    if fault == NO_SEAL:
        if must_be_sealed:
            raise ValueError(f"{path}: {NO_SEAL}")
    elif fault is not None:
        raise damaged(path, fault)


def damaged(
    path: Path, reason: str, remedy: str = "remove it to do this stage again"
) -> ValueError:
    """Return the error of a file that can't be used."""
    return ValueError(f"{path}: damaged ({reason}); {remedy}")
