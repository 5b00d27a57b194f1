"""Experiments by name, with or without a file: `+experiment=ddim_w4a4_lsq_tdq`.

The name of a run says which options it was composed of (`naming.fit_name`), so the way back needs
no file: `<model>[_<bits>]_<method>`, then the labels of whatever else differs from its default.

    ddim_small_w4a4_lsq_tdq          model=ddim_small bits=w4a4 method=lsq tdq=temporal
    ldm_w8a5_ptq4dm_float_attention  model=ldm_churches bits=w8a5 method=ptq4dm tdq=none
                                     plan=float_attention
    digits_fp                        model=digits method=fp

After the method an option may be written by its own name in place of its label, as here: the label
of plan=float_attention is `fattn`, and the run is called ldm_w8a5_ptq4dm_fattn either way. Last
comes a label of values, one of those that `configs/labels.yaml` explains.

    ddim_small_w4a4_lsq_u4000        model=ddim_small bits=w4a4 method=lsq tdq=none
                                     fit.updates=4000 label=u4000

The files of `configs/experiment` are the documented ones; they win where both exist. Nothing here
needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from tdq_exp.config import assets, naming
from tdq_exp.fit.registry import OPTIONS

_VALUE = re.compile(r"[a-z]\w*(\.\w+)+=.*")

# Groups whose labels may follow the method, in the order in which `fit_name` writes them.
LATER = (*naming.LABELLED, "calibration", "debug")


def register(overrides: Sequence[str]) -> None:
    """Make every experiment that a command line names known to Hydra.

    Args:
        overrides: as on the command line; `+experiment=a,b` of a sweep names two.

    Raises:
        ValueError: for a name that is neither a file nor a list of choices; names the nearest ones.
    """
    for name in _named(overrides):
        if name in documented():
            continue

        choices = choices_of(name)
        if choices is None:
            raise ValueError(
                f"+experiment={name}: no such experiment; the nearest: {', '.join(nearest(name))}"
            )

        ConfigStore.instance().store(
            group="experiment", name=name, node=_node(choices), package="_global_"
        )


def documented() -> list[str]:
    """Return the names of the files in `configs/experiment`."""
    return sorted(path.stem for path in (assets.configs() / "experiment").glob("*.yaml"))


def choices_of(name: str) -> list[str] | None:
    """Return the overrides that a name of a run stands for, `["model=digits", "method=fp"]`.

    Returns:
        Options of groups, then single values; None if the name is not made of known labels.

    Raises:
        ValueError: if `configs/labels.yaml` explains a label in another form than its own.
    """
    choices = _choices_of_labels(name)
    if choices is not None:
        return choices

    for label, meaning in _labels_of_values().items():
        if not name.endswith(f"_{label}"):
            continue
        choices = _choices_of_labels(name.removesuffix(f"_{label}"))
        if choices is not None and meaning.goes_with(choices):
            return [*choices, *meaning.values, f"label={label}"]
    return None


def is_option(choice: str) -> bool:
    """Return whether a choice of `choices_of` is an option of a group; it is a value otherwise."""
    return "." not in choice.partition("=")[0] and not choice.startswith("label=")


def _choices_of_labels(name: str) -> list[str] | None:
    """Return the choices of a name that has no label of values; None if it is not one."""
    for model, after_model in _prefixes("model", name):
        for bits, after_bits in [*_prefixes("bits", after_model), (None, after_model)]:
            for method, rest in _prefixes("method", after_bits):
                # A float model has no bits, and everything else has.
                if (bits is None) != (method in _float_methods()):
                    continue

                later = _later_choices(rest, LATER)
                if later is None:
                    continue

                first = [f"model={model}", *([f"bits={bits}"] if bits else []), f"method={method}"]
                if bits and not any(choice.startswith("tdq=") for choice in later):
                    first.append("tdq=none")
                return first + later

    return None


def nearest(name: str, count: int = 4) -> list[str]:
    """Return the experiments whose names are most like a misspelt one."""
    quantized = [method for method in _labels("method") if method not in _float_methods()]
    known = [*documented(), *(f"{model}_fp" for model in _labels("model"))]
    known += [
        "_".join(part for part in parts if part)
        for parts in product(_labels("model"), _labels("bits"), quantized, ("", "tdq"))
    ]
    return difflib.get_close_matches(name, dict.fromkeys(known), count, cutoff=0.0)


def _later_choices(rest: str, groups: Sequence[str]) -> list[str] | None:
    """Return the choices that the labels after the method stand for; None if one is unknown."""
    if not rest:
        return []

    for number, group in enumerate(groups):
        for option, after in [*_prefixes(group, rest), *_prefixes(group, rest, own_names=True)]:
            found = _later_choices(after, groups[number + 1 :])
            if found is not None:
                return [f"{group}={option}", *found]

    value, _, after = rest.partition("_")
    if value in _values():
        found = _later_choices(after, ("debug",))
        return None if found is None else [*found, _values()[value]]
    return None


@dataclass(frozen=True)
class _Meaning:
    """What a label of values stands for; see `configs/labels.yaml`.

    Args:
        values: `group.key=value` each.
        models, methods: options that it is valid for; empty: all.
        not_with: groups of which no option may be chosen.
    """

    values: Sequence[str]
    models: Sequence[str] = ()
    methods: Sequence[str] = ()
    not_with: Sequence[str] = ()

    def goes_with(self, choices: Sequence[str]) -> bool:
        """Return whether the label may follow a name of these choices."""
        chosen = dict(choice.split("=", 1) for choice in choices)
        return (
            chosen["model"] in (self.models or [chosen["model"]])
            and chosen["method"] in (self.methods or [chosen["method"]])
            and not {*self.not_with} & chosen.keys()
        )


@lru_cache
def _labels_of_values() -> dict[str, _Meaning]:
    """Return label -> meaning of those that `configs/labels.yaml` explains.

    Raises:
        ValueError: naming the file and the label, if it is explained in another form.
    """
    file = assets.configs() / "labels.yaml"
    content = assets.read_yaml(file) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a list of `label: {{values: [group.key=value]}}`")

    for label, meaning in content.items():
        problem = _problem_of(str(label), meaning)
        if problem is not None:
            raise ValueError(f"{file}: {label}: {problem}")
    return {str(label): _Meaning(**meaning) for label, meaning in content.items()}


def _problem_of(label: str, meaning: object) -> str | None:
    """Return what is wrong with a label of values, or None."""
    known = {field.name for field in dataclasses.fields(_Meaning)}
    if not isinstance(meaning, dict) or not {"values"} <= meaning.keys() <= known:
        return f"write {{values: [group.key=value]}}, and if need be {', '.join(sorted(known))}"
    for key, words in meaning.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return f"{key} must be a list of words"

    # An option of a group is a label of its own, and would be chosen beside another.
    for value in meaning["values"]:
        if not _VALUE.fullmatch(value):
            return f"{value}: must be group.key=value"

    for group, names in (("model", meaning.get("models")), ("method", meaning.get("methods"))):
        options = {path.stem for path in (assets.configs() / group).glob("*.yaml")}
        if unknown := sorted({*(names or ())} - options):
            return f"{unknown[0]}: no such {group}"

    if _later_choices(label, LATER) is not None:
        return "is the label of an option already"
    return None


@lru_cache
def _values() -> dict[str, str]:
    """Return label -> override of the settings of fits that a run's name tells."""
    return {
        label: f"fit.{field.name}={str(value).lower() if isinstance(value, bool) else value}"
        for options in OPTIONS.values()
        for field in dataclasses.fields(options)
        for value, label in field.metadata.get("named", {}).items()
    }


def option_of(group: str, label: str) -> str:
    """Return the option of a group that has a label, or the label if none has it."""
    return _labels(group).get(label, label)


def _prefixes(group: str, name: str, own_names: bool = False) -> list[tuple[str, str]]:
    """Return (option, what is left) for every label of a group that a name begins with.

    Args:
        group: whose options are meant.
        name: what is left of a run's name.
        own_names: look for the names of the options themselves, where their labels are others.
    """
    spelt = _labels(group)
    if own_names:
        spelt = {option: option for label, option in spelt.items() if option != label}

    return [
        (option, name[len(word) + 1 :])
        for word, option in spelt.items()
        if name == word or name.startswith(f"{word}_")
    ]


@lru_cache
def _labels(group: str) -> dict[str, str]:
    """Return label -> option of a group, for the options that have one."""
    labels = {}
    for path in sorted((assets.configs() / group).glob("*.yaml")):
        label = _value(path, group, "label")
        if label:
            labels[str(label)] = path.stem
    return labels


@lru_cache
def _float_methods() -> set[str]:
    """Return the methods that quantize nothing."""
    folder = assets.configs() / "method"
    return {
        path.stem for path in folder.glob("*.yaml") if _value(path, "method", "quantized") is False
    }


def _value(path: Path, group: str, key: str) -> object:
    """Return a key of an option: at the top, or below its group in a file of global package."""
    content = assets.read_yaml(path) or {}
    return content.get(key, (content.get(group) or {}).get(key))


def _named(overrides: Sequence[str]) -> list[str]:
    """Return the experiments that overrides name, all of a sweep's."""
    names: list[str] = []
    for override in overrides:
        if not override.lstrip("+").startswith("experiment="):
            continue

        try:
            parsed = OverridesParser.create().parse_override(override)
            is_list = parsed.is_choice_sweep()
            names += parsed.sweep_string_iterator() if is_list else [parsed.get_value_string()]
        except HydraException:
            continue  # whoever composes says what is wrong with its grammar
    return [name for name in names if name not in ("", "null")]


def _node(choices: Sequence[str]) -> dict[str, object]:
    """Return the content that a file of these choices would have."""
    options = [choice for choice in choices if is_option(choice)]
    values = OmegaConf.from_dotlist([choice for choice in choices if choice not in options])
    defaults = [
        {f"override /{group}": option} for group, _, option in (o.partition("=") for o in options)
    ]
    return {"defaults": defaults, **OmegaConf.to_container(values)}  # type: ignore[dict-item]
