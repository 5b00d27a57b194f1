"""Composing a configuration from the overrides of a command line, with mistakes as one line.

A table composes hundreds of configs that differ in a few values: what the options of groups compose
to is kept, and a value is set on a copy. So is an option of a group that nothing else writes into,
such as the bits, which would take Hydra a tenth of a second. Quick: nothing here needs torch.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdq_exp.config import assets, experiments, schema

KEPT = 512  # compositions: more than all tables of a scale have cells
_UNKNOWN_KEY = re.compile(
    r"Could not override '([^']+)'\. To append to your config use (\+.*?)(?:: Key '.*)?$"
)
_PLAIN_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_PLAIN_OPTION = re.compile(r"(\w+)=(\w+)")
_KEY = re.compile(r"^(\w+):", re.MULTILINE)
_DEFAULTS = re.compile(r"^defaults:\n((?: +- .*\n)+)", re.MULTILINE)
_WORDS = re.compile(r"(?: +- \w+\n)+")
_FLOW = re.compile(r"^\{ *\w", re.MULTILINE)  # keys at the top that are not at a line's beginning
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


def register(overrides: Sequence[str] = ()) -> None:
    """Make the schema, each fit and the experiments that overrides name known to Hydra."""
    _register_schema()
    experiments.register(overrides)


@lru_cache
def _register_schema() -> None:
    for group, name, node in schema.nodes():
        ConfigStore.instance().store(group=group, name=name, node=node)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the config that a command line would give.

    Args:
        overrides: as on the command line: `group=option`, `key=value`, `+experiment=NAME`.

    Raises:
        ValueError: for an unknown group, option or key, or a value of the wrong type; one line.
    """
    files = state_of_files()
    values = [override for override in overrides if _is_value(override)]
    options = [override for override in overrides if not _is_value(override)]

    try:
        return _with_values(_of_options(tuple(options), files), values)
    except (HydraException, OmegaConfBaseException, ValueError):
        # Hydra says what is wrong, of the whole line.
        return _copy(_composed(tuple(overrides), files))


def value_of(overrides: Sequence[str], key: str) -> Any:
    """Return the value of a key that a command line would give; None if there is no such key.

    Raises:
        ValueError: as `compose`.
    """
    return OmegaConf.select(compose(overrides), key)


@lru_cache(KEPT)
def _of_options(options: tuple[str, ...], files: object) -> DictConfig:
    """Return what Hydra composes from options of groups, assembled from kept parts if possible.

    An option of an independent group gives the same node in every composition. So its node may come
    from any earlier composition, and the rest from one with the same other options.

    Args, Raises: see `_composed`.
    """
    chosen = _independent_choices(options, files)
    if not chosen:
        return _composed(options, files)

    # Plain options of different groups, all of them: their order says nothing.
    others = [option for option in options if option.partition("=")[0] not in chosen]
    frames, nodes = _parts_kept(files)
    frame = (tuple(sorted(others)), frozenset(chosen))

    if frame in frames and nodes.keys() >= set(chosen.items()):
        cfg = _copy(frames[frame])
        for choice in chosen.items():
            cfg[choice[0]] = nodes[choice]
        return cfg

    cfg = _composed(options, files)
    frames[frame] = cfg
    nodes.update({choice: cfg[choice[0]] for choice in chosen.items()})
    return cfg


@lru_cache(1)
def _parts_kept(
    files: object,
) -> tuple[
    dict[tuple[tuple[str, ...], frozenset[str]], DictConfig], dict[tuple[str, str], DictConfig]
]:
    """Return (frames, nodes) that `_of_options` keeps, empty at first, of a state of the files."""
    return {}, {}


def _independent_choices(options: Sequence[str], files: object) -> dict[str, str]:
    """Return group -> option of the options that are of an independent group.

    None are if something else than plain choices of groups is among them: an experiment may write
    anywhere, and of a group that is named twice Hydra says what is wrong.
    """
    found = [_PLAIN_OPTION.fullmatch(option) for option in options]
    choices = {match[1]: match[2] for match in found if match is not None}
    if len(choices) < len(options) or "experiment" in choices:
        return {}
    return {group: choices[group] for group in choices.keys() & _independent_groups(files)}


@lru_cache(1)
def _independent_groups(files: object) -> frozenset[str]:
    """Return the groups into which nothing writes but their own options, which write nowhere else.

    Files are read as text: parsing all of them takes longer than composing twice.

    Args:
        files: their state.
    """
    root = assets.configs()
    written = set(_KEY.findall((root / "config.yaml").read_text()))

    for path in root.glob("*/*.yaml"):
        text = path.read_text()
        package = _PACKAGE.search(text)
        if package is not None:
            written |= {path.parent.name, *_KEY.findall(text)}
            if package[1] != "_global_" or _FLOW.search(text):
                return frozenset()  # it may write anywhere

        # Options that a file takes over are of its own group if they are named by a word.
        taken = _DEFAULTS.search(text)
        if "defaults:" in text and (taken is None or not _WORDS.fullmatch(taken[1])):
            written.add(path.parent.name)

    return frozenset({path.name for path in root.iterdir() if path.is_dir()} - written)


@lru_cache(KEPT)
def _composed(overrides: tuple[str, ...], files: object) -> DictConfig:
    """Return what Hydra composes of overrides.

    Args:
        overrides: any of a command line.
        files: state of the files that are read; another state composes anew.

    Raises:
        ValueError: see `compose`.
    """
    register(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(assets.configs())):
            return hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error, overrides)) from error


def _with_values(composed: DictConfig, values: Sequence[str]) -> DictConfig:
    """Return a copy of a config with values set, as Hydra sets them after composing.

    Raises:
        HydraException, OmegaConfBaseException, ValueError: for what Hydra would refuse.
    """
    cfg = _copy(composed)
    for override in OverridesParser.create().parse_overrides(list(values)):
        if override.is_sweep_override():
            raise ValueError(f"{override.input_line}: is a sweep")
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    return cfg


def _copy(cfg: DictConfig) -> DictConfig:
    """Return a copy of a config: by pickling, in a third of the time of `copy.deepcopy`."""
    copied: DictConfig = pickle.loads(pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL))
    return copied


def _is_value(override: str) -> bool:
    """Return whether an override sets a single value (`key=value`), and chooses no option."""
    key, equals, _ = override.partition("=")
    if not equals or not _PLAIN_KEY.fullmatch(key):
        return False
    return key.split(".")[0] != "hydra" and not (assets.configs() / key).is_dir()


def state_of_files() -> object:
    """Return what changes when a file of the configs does: their paths and times."""
    root = assets.configs()
    stats = ((path, path.stat()) for path in root.rglob("*.yaml"))
    return root, hash(frozenset((path, s.st_mtime_ns, s.st_size) for path, s in stats))


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep: `key=a,b` gives two, and the last turns first.

    Raises:
        ValueError: for a mistake in the grammar, a range without steps, or a pattern that no
            option matches; one line.
    """
    choices: list[list[str]] = []

    for override in overrides:
        try:
            # One at a time, as a list: only then does an error say which override it is of.
            (parsed,) = OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            raise ValueError(_one_line(error)) from error

        if not parsed.is_sweep_override():
            choices.append([override])
            continue
        if not parsed.is_discrete_sweep():
            raise ValueError(f"{override}: an interval has no steps; list its values")

        key = parsed.get_key_element()
        if isinstance(pattern := parsed.value(), Glob):
            options = pattern.filter(_options_of(parsed.key_or_group))
            if not options:
                raise ValueError(f"{override}: matches no option; list the values")
        else:
            options = list(parsed.sweep_string_iterator())
        choices.append([f"{key}={option}" for option in options])

    return [list(job) for job in product(*choices)]


def _options_of(group: str) -> list[str]:
    """Return the names of the options of a group, none if there is no such group."""
    return sorted(path.stem for path in (assets.configs() / group).glob("*.yaml"))


def _one_line(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """Return Hydra's message as one line, without search path and debug hint.

    Args:
        error: what Hydra or OmegaConf raised.
        overrides: what it raised it for; a misspelt key among them gets the nearest one named.
    """
    if isinstance(error, OverrideParseException):
        return _grammar_hint(str(error.override))

    message = str(error).split("Config search path")[0].split("Set the environment")[0]
    words = " ".join(message.split())

    # Hydra advises to add the key, which helps only where a class takes it.
    unknown = _UNKNOWN_KEY.match(words)
    if unknown:
        key, added = unknown.groups()
        near = _nearest_key(key, overrides)
        hint = f"did you mean {near}? An" if near else "an"
        return (
            f"{key}: there is no such key among these choices; {hint} argument that its class takes"
            f" is added with {added}"
        )

    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in words:
        words += f": {str(cause).splitlines()[0]}"
    return words


def _nearest_key(key: str, overrides: Sequence[str]) -> str | None:
    """Return the key that a misspelt one most resembles, or that ends in it; None if none does.

    Args:
        key: `fit.updatess`, or `updates` without its group.
        overrides: of the command line; the options of groups among them say which keys there are.
    """
    options = tuple(o for o in overrides if not _is_value(o))
    if len(options) == len(overrides):
        return None  # the misspelt one is among them, as `method/foo=lsq`

    try:
        cfg = _composed(options, state_of_files())
    except ValueError:  # which is another mistake of the same line
        return None

    names = _keys(OmegaConf.to_container(cfg, resolve=False))
    known = [name for name in names if not key.startswith(f"{name}.")]

    ends = sorted((name for name in known if name.endswith(f".{key}")), key=lambda n: n.count("."))
    return next(iter(ends or difflib.get_close_matches(key, known, 1, cutoff=0.75)), None)


def _keys(node: Any, before: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a config."""
    for name, value in node.items() if isinstance(node, dict) else ():
        yield f"{before}{name}"
        yield from _keys(value, f"{before}{name}.")


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
