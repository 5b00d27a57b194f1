"""What every key of a configuration means: the help of settings, and the docstrings of classes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tdq_exp.config import schema
from tdq_exp.config.setting import range_of

_ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Args:
        name: `group.key`.
        value: as text.
        limits: what it may be, as text; empty if nothing is known.
        meaning: in words.
    """

    name: str
    value: str
    limits: str
    meaning: str


def keys_of(values: Mapping[str, Any]) -> list[Key]:
    """Return every key of a configuration.

    Args:
        values: the configuration, plain.
    """
    return list(_fields(schema.Config, values, ""))


def _fields(options: type[Any], values: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    """Yield the keys of a dataclass, those of nested ones and of nodes with a class in place."""
    for field in dataclasses.fields(options):
        name, value = f"{prefix}{field.name}", values[field.name]

        if (inner := _class_of(field, name, values)) is not None:
            yield from _fields(inner, value, f"{name}.")
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from _arguments(value, name)
        else:
            about = field.metadata
            in_name = "label in the run's name" if about.get("is_name") else ""
            yield Key(name, _text(value), range_of(about), about.get("help", in_name))


def _class_of(field: dataclasses.Field[Any], name: str, values: Mapping[str, Any]) -> Any:
    """Return the dataclass that a field holds, or None."""
    if name in schema.groups():
        return schema.class_of(name, values[name])
    return field.default_factory if dataclasses.is_dataclass(field.default_factory) else None


def _arguments(node: Mapping[str, Any], name: str) -> Iterator[Key]:
    """Yield the class of a node, and its arguments as the class' docstring explains them.

    Those that the node leaves out, too, with their defaults.
    """
    target = node["_target_"]
    named = _named(target)
    yield Key(f"{name}._target_", target, "", _summary(named))

    explained = _explained(named)
    for key, value in node.items():
        if isinstance(value, Mapping) and "_target_" in value:
            yield from _arguments(value, f"{name}.{key}")
        elif not key.startswith("_"):
            yield Key(f"{name}.{key}", _text(value), "", explained.get(key, ""))

    # What is not written keeps its default; of a `_partial_` class the rest is given by the code.
    others = {} if node.get("_partial_") or named is None else inspect.signature(named).parameters
    for key, parameter in others.items():
        if key in explained and key not in node and parameter.default is not parameter.empty:
            added = f"with +{name}.{key}="
            yield Key(f"{name}.{key}", _text(parameter.default), added, explained[key])


def _named(target: str) -> Any:
    """Return the class that a node names, or None if it can't be imported."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _summary(named: Any) -> str:
    """Return the first paragraph of a docstring."""
    text = inspect.getdoc(named) if named is not None else None
    return " ".join((text or "").split("\n\n")[0].split())


def _explained(named: Any) -> dict[str, str]:
    """Return argument -> its explanation, of the `Args:` of a class, inherited ones too."""
    explained: dict[str, str] = {}
    for one in reversed(inspect.getmro(named) if inspect.isclass(named) else [named]):
        text = inspect.cleandoc(one.__doc__ or "").partition("\nArgs:\n")[2]
        parts = _ARGUMENT.split(re.split(r"\n(?=\S)", text)[0])
        for names, words in zip(parts[1::2], parts[2::2], strict=True):
            explained |= {name: " ".join(words.split()) for name in names.split(", ")}
    return explained


def _text(value: Any) -> str:
    """Return a value as it is written on a command line; a large one by its size."""
    if isinstance(value, Mapping):
        return f"({len(value)} keys)"
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(entry) for entry in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
