"""Settings: numbers that a component declares once, with default, range and help.

The dataclass that consumes a number declares it as `setting(...)`. The schema of the configuration,
the check of a command line, the keys of a fingerprint and the labels in a run's name are derived
from these fields; none of them keeps a list of its own.

    @dataclass
    class TrainOptions:
        updates: int = setting(low=1, help="optimiser steps")
        lr_schedule: str = setting("constant", choices=("constant", "cosine"), since="constant")
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import MISSING

_ALWAYS = object()  # of a key that every fingerprint holds, whatever its value

SEED = 2**63 - 1  # the largest seed: torch's generators take 64 bits

FEWEST_BITS, MOST_BITS = 2, 16  # of a grid

# What a value must be, by type.
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

# A label is part of a folder's name: nothing in it leaves the folder, or needs quotes in a shell.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LONGEST_NAME = 100  # characters; file systems take 255 bytes for all labels together


def setting(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    fingerprint: bool = True,
    since: Any = _ALWAYS,
    **words: Any,
) -> Any:
    """Return a dataclass field that knows its range and its part in a fingerprint.

    Args:
        default: the value if nothing else is said; without one, a config has to give it.
        low, high: smallest and largest value, both allowed.
        above, below: bounds that are not allowed themselves.
        choices: the values of a name, or of each name in a list.
        fingerprint: whether a result depends on it; False for labels, paths and speed.
        since: for a key that was added later, the value with which every earlier result was made.
            It is part of a fingerprint only where it differs from that.
        words: `help`, one line for a reader; `named`, value -> what the run's name says of it;
            `most`, the largest value that is not refused as probably a typo, for numbers
            whose range has no end; `is_name`, for a text that becomes part of a folder's name.
    """
    about = {"low": low, "high": high, "above": above, "below": below, "choices": tuple(choices)}
    about |= {"fingerprint": fingerprint, "since": since, **words}

    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def check(options: Any, prefix: str, *, defaults: bool = True, skip: Collection[str] = ()) -> None:
    """Refuse a dataclass whose values are out of range; nested dataclasses are checked with it.

    Args:
        options: an instance whose fields are settings.
        prefix: of the keys in messages, such as `fit`; empty at the root.
        defaults: whether values that nobody set are checked, too.
        skip: fields that are left alone.

    Raises:
        ValueError: one line that begins with `key=value:`.
    """
    for field in dataclasses.fields(options):
        if field.name in skip:
            continue

        value = getattr(options, field.name)
        key = f"{prefix}.{field.name}" if prefix else field.name

        if dataclasses.is_dataclass(value):
            check(value, key, defaults=defaults)
            continue

        if not defaults and value == field.default:
            continue

        problem = _problem(value, field.metadata)
        if problem is not None:
            text = f"{value!r}" if isinstance(value, str) else f"{value}"
            raise ValueError(f"{key}={text}: {problem}")


def _problem(value: Any, about: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a value, or None."""
    choices = about.get("choices", ())
    if choices:
        several = isinstance(value, list)
        known = bool(value) and set(value) <= set(choices) if several else value in choices
        return None if known else _choose(choices, several)

    if about.get("is_name") and isinstance(value, str):
        return _name_problem(value)

    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"

    # A range has two ends, or one.
    low, high, above = about.get("low"), about.get("high"), about.get("above")
    if low is not None and high is not None:
        what = "a whole number" if isinstance(value, int) else "a number"
        return None if low <= value <= high else f"must be {what} from {low:g} to {high:g}"
    if low is not None and value < low:
        return "must not be negative" if low == 0 else f"must be at least {low:g}"
    if high is not None and value > high:
        return f"must be at most {high:g}"
    if above is not None and value <= above:
        return "must be positive" if above == 0 else f"must be above {above:g}"
    below = about.get("below")
    if below is not None and value >= below:
        return f"must be below {below:g}"

    most = about.get("most")
    if most is not None and value > most:
        return f"must be at most {most:g}"
    return None


_BOUNDS = (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"), ("most", "<="))


def range_of(about: Mapping[str, Any]) -> str:
    """Return what a setting may be, in words: its choices, or its bounds; empty without either.

    Args:
        about: the metadata of the field.
    """
    if about.get("choices"):
        return ", ".join(about["choices"])

    bounds = [
        f"{sign} {about[end]:g}"
        for end, sign in _BOUNDS
        if about.get(end) is not None and about[end] != SEED
    ]
    return ", ".join(bounds)


def require(key: str, value: Any, kind: type[Any], **about: Any) -> None:
    """Refuse a value that a constructor can't take: of another type, or out of range.

    Args:
        key: for the message, `tdq.interval.groups`.
        value: what was given.
        kind: `int`, `float` (whole numbers are taken), `bool` or `str`.
        about: the range, as in `setting`.

    Raises:
        ValueError: one line that begins with `key=value:`.
    """
    problem = None if is_of(value, kind) else f"must be {KINDS[kind]}"
    problem = problem or _problem(value, about)
    if problem is not None:
        raise ValueError(f"{key}={value}: {problem}")


def about(options: type[Any], name: str) -> dict[str, Any]:
    """Return what a dataclass declares of a field, its range among it, for `require`."""
    (field,) = (field for field in dataclasses.fields(options) if field.name == name)
    return dict(field.metadata)


def is_of(value: Any, kind: type[Any]) -> bool:
    """Return whether a value is of a plain type; a boolean is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _name_problem(value: str) -> str | None:
    """Return what keeps a text from being part of a folder's name, or None."""
    if len(value) > _LONGEST_NAME:
        return f"is part of a folder's name: at most {_LONGEST_NAME} characters"
    if value and not _NAME.fullmatch(value):
        return "is part of a folder's name: letters, digits and _, with - and . inside"
    return None


def _choose(choices: Sequence[str], several: bool) -> str:
    if several:
        return f"choose from {', '.join(choices)}"
    if len(choices) <= 2:
        return f"choose {' or '.join(choices)}"
    return f"choose one of {', '.join(choices)}"


def fingerprint_keys(options: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a result depends on: no label, no path, nothing about speed.

    Args:
        options: the dataclass that declares them.
        values: plain values by key; keys that the dataclass does not declare are left out.
    """
    parts = {}

    for field in dataclasses.fields(options):
        about = field.metadata
        if not about.get("fingerprint", True):
            continue

        since = about.get("since", _ALWAYS)
        if since is _ALWAYS:
            parts[field.name] = values[field.name]
        elif (value := values.get(field.name, since)) != since:
            parts[field.name] = value

    return parts


def labels(options: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return what a run's name says of unusual values, in the order of the fields."""
    # Values of a config are slow to read: those of the few fields with names alone.
    named = [
        (names, values[field.name])
        for field in dataclasses.fields(options)
        if (names := field.metadata.get("named"))
    ]
    return [names[value] for names, value in named if value in names]


def unknown_keys(options: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return the keys that a dataclass does not declare."""
    return sorted(values.keys() - {field.name for field in dataclasses.fields(options)})
