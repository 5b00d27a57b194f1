"""Composing a configuration from the overrides of a command line, with mistakes as one line.

Quick: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tdq_exp.config import assets, experiments, schema


def register(overrides: Sequence[str] = ()) -> None:
    """Make the schema, each fit and the experiments that overrides name known to Hydra."""
    for group, name, node in schema.nodes():
        ConfigStore.instance().store(group=group, name=name, node=node)
    experiments.register(overrides)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the config that a command line would give.

    Args:
        overrides: as on the command line: `group=option`, `key=value`, `+experiment=NAME`.

    Raises:
        ValueError: for an unknown group, option or key, or a value of the wrong type; one line.
    """
    register(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(assets.configs())):
            return hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep: `key=a,b` gives two, and the last turns first.

    Raises:
        ValueError: for a mistake in the grammar, or a range without steps; one line.
    """
    choices: list[list[str]] = []

    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise ValueError(_one_line(error)) from error

        if not parsed.is_sweep_override():
            choices.append([override])
            continue
        if not parsed.is_discrete_sweep():
            raise ValueError(f"{override}: an interval has no steps; list its values")

        key = parsed.get_key_element()
        choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])

    return [list(job) for job in product(*choices)]


def _one_line(error: BaseException) -> str:
    """Return Hydra's message as one line, without search path and debug hint."""
    said = str(error).split("Config search path")[0].split("Set the environment")[0]
    words = " ".join(said.split())
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in words:
        words += f": {str(cause).splitlines()[0]}"
    return words
