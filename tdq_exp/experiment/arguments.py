"""Arguments of the classes that a configuration names: their keys and types, checked at once.

A node with `_target_` holds what a constructor takes. Its signature says which keys there are and
of what type each value is; the constructor itself says the ranges. So a misspelt key, `groups=2.5`
and `he=7` are refused here, for every class, with one line that names the key.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdq_exp.config.setting import KINDS, is_of, require

# Keys of a node that are Hydra's, not the constructor's.
OF_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def require_node(node: Any, key: str) -> None:
    """Refuse what names no class, or holds arguments that its class does not take.

    Args:
        node: plain values.
        key: of the node, for messages.

    Raises:
        ValueError: one line that names the key.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ValueError(f"{key}={node}: must name a class by its _target_")
    check_arguments(node, key)


def check_arguments(node: Any, key: str) -> None:
    """Refuse arguments that the class of a node does not take.

    Args:
        node: plain values; what names no class of ours is left to whoever instantiates it.
        key: of the node, for messages.

    Raises:
        ValueError: one line that names the key.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        return

    named = node["_target_"]
    if not isinstance(named, str) or not _DOTTED.fullmatch(named):
        raise ValueError(f"{key}._target_={named}: must be the dotted name of a class")
    if not isinstance(node.get("_partial_", False), bool):
        raise ValueError(f"{key}._partial_={node['_partial_']}: must be true or false")
    if not named.startswith("tdq_exp."):
        return

    if "_args_" in node:
        raise ValueError(f"{key}._args_: arguments are given by name")

    target = _target(named, key)
    known = _parameters(target)

    for name, value in node.items():
        if name in OF_HYDRA:
            continue
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = (
                f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known) or 'none'}"
            )
            raise ValueError(f"{key}.{name}: {target.__name__} takes no such key{hint}")

        _check_value(value, known[name], f"{key}.{name}")
        check_arguments(value, f"{key}.{name}")


def _target(path: str, key: str) -> Callable[..., Any]:
    """Return the class or function that a node names.

    Raises:
        ValueError: if there is none.
    """
    package, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}._target_={path}: there is no such class") from error

    if not callable(target):
        raise ValueError(f"{key}._target_={path}: is no class")
    return target  # type: ignore[no-any-return]


def _parameters(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the keys that a constructor takes, with their types; those of its bases included."""
    known: dict[str, Any] = {}
    bases = target.__mro__ if isinstance(target, type) else (None,)

    for base in bases:
        function = target if base is None else vars(base).get("__init__")
        if not inspect.isfunction(function):
            continue

        types_of = _types(function)
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                known.setdefault(parameter.name, types_of.get(parameter.name, Any))

        # What is passed on to a base is the base's to name.
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break

    return known


def _types(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's parameters, as far as they can be evaluated."""
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that is imported for type checkers only
        return {}


def _check_value(value: Any, wanted: Any, key: str) -> None:
    """Refuse a value of another type than a parameter's."""
    choices = typing.get_args(wanted) if _is_union(wanted) else (wanted,)

    # One plain type, or null: the message says what it must be.
    plain = [choice for choice in choices if choice in KINDS]
    optional = type(None) in choices
    others = [choice for choice in choices if choice not in (*plain, type(None), Path)]
    if plain and not others:
        if value is None and optional:
            return
        if not any(is_of(value, kind) for kind in plain):
            words = [KINDS[kind] for kind in plain] + ["null"] * optional
            raise ValueError(f"{key}={value}: must be {' or '.join(words)}")
        if isinstance(value, float):
            require(key, value, float)  # finite
        return

    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if origin in (Sequence, list, tuple) and isinstance(value, str):
            raise ValueError(f"{key}={value}: must be a list: [{value}]")


def _is_union(wanted: Any) -> bool:
    return typing.get_origin(wanted) in (typing.Union, types.UnionType)
