"""Nodes of a config with a `_target_`, as objects: each of the class that its place wants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from tdq_exp.data.sources import Source
from tdq_exp.experiment.arguments import require_node
from tdq_exp.quant.convert import Recipe
from tdq_exp.quant.intervals.base import Intervals
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import ReleaseDetails

M = TypeVar("M")
Values = Mapping[str, Any]  # a configuration as plain values, without interpolations


def source_of(values: Values) -> Source:
    """Return the source of images that a config names.

    Raises:
        ValueError: if it names something else.
    """
    images = make(values, "data.source")
    if not callable(getattr(images, "read", None)):
        raise ValueError("data.source: must name a source of images by its _target_")
    return images  # type: ignore[no-any-return]


def recipe_of(values: Values) -> Recipe:
    """Return the quantizers that a config names.

    Raises:
        ValueError: if a slot of theirs names something else.
    """
    intervals = make(values, "tdq.interval")
    if not isinstance(intervals, Intervals):
        raise ValueError("tdq.interval: must name a source of step sizes by its _target_")

    return Recipe(
        weight_bits=values["bits"]["weight"],
        act_bits=values["bits"]["act"],
        weight=_rule(values, "weight.quantizer"),
        act=_rule(values, "act.quantizer"),
        intervals=intervals,
        weight_interval=values["weight"]["interval"],
        zero_point=values["tdq"]["zero_point"],
        plan=make_of(values, "plan.plan", Plan),
        habits=make_of(values, "habits.habits", ReleaseDetails),
    )


def _rule(values: Values, key: str) -> Any:
    """Return a class of quantizers that a config names, with what it is to be called with.

    Raises:
        ValueError: if it names something else.
    """
    rule = make(values, key)
    named = rule.func if isinstance(rule, partial) else None
    if not (isinstance(named, type) and issubclass(named, Quantizer)) or named is Quantizer:
        raise ValueError(f"{key}: must name a quantizer by its _target_, with _partial_: true")
    return rule


def make_of(values: Values, key: str, kind: type[M]) -> M:
    """Instantiate a node whose class is known.

    Raises:
        ValueError: if it gives anything else; and as `make`.
    """
    made = make(values, key)
    if not isinstance(made, kind):
        raise ValueError(f"{key}: must name a {kind.__name__} by its _target_")
    return made


def make(values: Values, key: str) -> Any:
    """Instantiate a node.

    Args:
        values: the configuration.
        key: `group.name` of the node.

    Raises:
        ValueError: what its constructor says of a value, or which option it does not know.
    """
    group, name = key.split(".")
    node = values[group][name]
    require_node(node, key)

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, FileNotFoundError | ValueError):
            raise type(cause)(str(cause)) from error
        raise ValueError(f"{key}: {str(cause or error).splitlines()[0]}") from error
