"""Stable names in records: reading older ones, and refusing what is not ours.

A recorded configuration names classes by the face of their package, `tdq_exp.quant.Lsq`, never by
the file that they lie in. Records of before faces existed hold file paths; `upgrade` rewrites them.
A record may come from a stranger, and instantiating it calls what it names: `require_known` lets
only names of our own faces through.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

FACES = ("data", "diffusion", "fit", "metrics", "models", "quant")

# Whose classes a group of a configuration may name. No other group names any.
SLOTS = {
    "model": ("diffusion", "models"),
    "sampler": ("diffusion", "models"),
    "data": ("data",),
    "eval": ("metrics",),
    "act": ("quant",),
    "weight": ("quant",),
    "tdq": ("quant",),
    "plan": ("quant",),
    "habits": ("quant",),
}

# Parts of a face that code makes, of objects: no configuration names them.
MADE_BY_CODE = {
    f"tdq_exp.quant.{name}"
    for name in (
        "Dynamic",
        "Bank",
        "Interval",
        "Intervals",
        "LookupTable",
        "LowerBound",
        "PerStep",
        "Quantizer",
        "Static",
        "Temporal",
        "TimeContext",
        "ZeroPoint",
    )
}

# File paths of older records -> face names.
MOVED = {
    "tdq_exp.data.images.Digits": "tdq_exp.data.Digits",
    "tdq_exp.data.images.Folder": "tdq_exp.data.Folder",
    "tdq_exp.data.images.Hub": "tdq_exp.data.Hub",
    "tdq_exp.diffusion.sampler.Ddim": "tdq_exp.diffusion.Ddim",
    "tdq_exp.diffusion.schedule.Schedule": "tdq_exp.diffusion.Schedule",
    "tdq_exp.metrics.features.digits": "tdq_exp.metrics.digits",
    "tdq_exp.metrics.features.efficientnet_lite0": "tdq_exp.metrics.efficientnet_lite0",
    "tdq_exp.metrics.features.inception": "tdq_exp.metrics.inception",
    "tdq_exp.models.autoencoder.Autoencoder": "tdq_exp.models.Autoencoder",
    "tdq_exp.models.latent.LatentDiffusionModel": "tdq_exp.models.LatentDiffusionModel",
    "tdq_exp.models.model.DiffusionModel": "tdq_exp.models.DiffusionModel",
    "tdq_exp.models.schedulers.Ddpm": "tdq_exp.models.Ddpm",
    "tdq_exp.models.schedulers.Pndm": "tdq_exp.models.Pndm",
    "tdq_exp.quant.habits.Habits": "tdq_exp.quant.ReleaseDetails",
    "tdq_exp.quant.interval.DynamicIntervals": "tdq_exp.quant.DynamicIntervals",
    "tdq_exp.quant.interval.PerStepIntervals": "tdq_exp.quant.PerStepIntervals",
    "tdq_exp.quant.interval.StaticIntervals": "tdq_exp.quant.StaticIntervals",
    "tdq_exp.quant.interval.TemporalIntervals": "tdq_exp.quant.TemporalIntervals",
    "tdq_exp.quant.lsq.Lsq": "tdq_exp.quant.Lsq",
    "tdq_exp.quant.minmax.MinMax": "tdq_exp.quant.MinMax",
    "tdq_exp.quant.minmax.MinMaxWeights": "tdq_exp.quant.MinMaxWeights",
    "tdq_exp.quant.nipq.Nipq": "tdq_exp.quant.Nipq",
    "tdq_exp.quant.nipq.NipqWeights": "tdq_exp.quant.NipqWeights",
    "tdq_exp.quant.pact.DorefaWeights": "tdq_exp.quant.DorefaWeights",
    "tdq_exp.quant.pact.Pact": "tdq_exp.quant.Pact",
    "tdq_exp.quant.pact.PactWeights": "tdq_exp.quant.PactWeights",
    "tdq_exp.quant.plan.Plan": "tdq_exp.quant.Plan",
}

# Keys of older records -> their names now, by config group.
RENAMED = {"tdq": {"offset": "zero_point"}}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration, or the parts of a fingerprint, in today's names.

    Args:
        config: groups of the configuration by name; read only.
    """
    upgraded = {}

    for group, value in config.items():
        keys = RENAMED.get(group, {})
        if keys and isinstance(value, Mapping):
            value = {keys.get(key, key): entry for key, entry in value.items()}
        upgraded[group] = _with_faces(value)

    return upgraded


def of_its_kind(
    config: Mapping[str, Any], declared: Mapping[str, set[str]], known: Mapping[str, set[str]]
) -> dict[str, Any]:
    """Return a recorded configuration without keys that belong to other kinds of fits and slots.

    Older records hold one flat bag of keys for every kind of fit. A key that no kind declares is
    kept, so that the schema refuses it.

    Args:
        config: groups of the configuration by name; read only.
        declared: group, or `group.part` -> the keys of the kind that the record is of.
        known: the same -> the keys of any kind.
    """
    kept: dict[str, Any] = copy.deepcopy(dict(config))

    for path, own in declared.items():
        *outer, last = path.split(".")
        parent = kept
        for name in outer:
            parent = parent.get(name, {})

        foreign = known[path] - own
        if isinstance(parent.get(last), Mapping):
            parent[last] = {key: value for key, value in parent[last].items() if key not in foreign}

    return kept


def _with_faces(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MOVED.get(str(entry), entry) if key == "_target_" else _with_faces(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_with_faces(entry) for entry in value]
    return value


def require_known(config: Any, where: str) -> None:
    """Refuse a recorded configuration that names anything but our own faces.

    Args:
        config: plain values.
        where: the file it came from, for the message.

    Raises:
        ValueError: naming the target, or a value that would be computed when it is read.
    """
    # A record holds plain values. An interpolation could become a target after this check.
    for text in texts(config):
        if "${" in text:
            raise ValueError(f"{where}: holds {text!r}, and a record has no interpolations")

    groups = config.items() if isinstance(config, Mapping) else [(None, config)]
    for group, content in groups:
        faces = FACES if group is None else SLOTS.get(str(group), ())
        for target in _targets(content):
            _require_face(target, faces, where)


def _require_face(target: Any, faces: Collection[str], where: str) -> None:
    """Refuse a target that is no class of these faces.

    Raises:
        ValueError: naming the target.
    """
    package, _, name = str(target).rpartition(".")
    known = package in {f"tdq_exp.{face}" for face in faces} and str(target) not in MADE_BY_CODE

    # Feature networks are made by functions; everything else that is made is a class.
    if known and name in importlib.import_module(package).__all__:
        named = getattr(sys.modules[package], name)
        if isinstance(named, type) or (callable(named) and package == "tdq_exp.metrics"):
            return

    raise ValueError(
        f"{where}: names {target!r}, which is not a part of tdq_exp that belongs there;"
        " nothing of it was run"
    )


def texts(value: Any) -> Iterator[str]:
    """Yield every text of plain nested values, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts(key)
            yield from texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts(entry)


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key == "_target_":
                yield entry
            else:
                yield from _targets(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _targets(entry)
