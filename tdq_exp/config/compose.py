"""Composing a configuration from the overrides of a command line, with mistakes as one line.

Quick: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
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


def _one_line(error: BaseException) -> str:
    """Return Hydra's message as one line, without search path and debug hint."""
    if isinstance(error, OverrideParseException):
        return _grammar_hint(str(error.override))

    said = str(error).split("Config search path")[0].split("Set the environment")[0]
    words = " ".join(said.split())
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in words:
        words += f": {str(cause).splitlines()[0]}"
    return words


def _grammar_hint(override: str) -> str:
    """Return what to do about an override that Hydra's grammar can't read.

    `=`, brackets, commas and quotes mean something to it, and file names have them.
    """
    key, equals, value = override.partition("=")
    if not key or not equals:
        return f"{override!r}: is no KEY=VALUE or GROUP=OPTION"

    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return (
        f"{override}: this value needs quotes of its own, for it has a sign that means something"
        f" to Hydra: \"{key}='{escaped}'\""
    )
