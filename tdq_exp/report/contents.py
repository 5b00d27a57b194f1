"""Which networks and images a cell takes, by their content: a row of others is stale.

| what                                         | its content is that of                     |
|----------------------------------------------|--------------------------------------------|
| shipped, or in a file that this package made | the file's tensors                         |
| any other that a user's override names       | the network, filled from it as for a run   |
| training images that a user's override names | the pixels, decoded as for a run           |
| any other that a configuration names         | unknown: it may be far away, and large     |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tdq_exp.config import assets
from tdq_exp.config.schema import plain

FEATURES = "features.weights"  # where a row has the hash of its feature network
IMAGES = "reference.content"  # where it has that of the images it was compared with
KEYS = {
    "model.weights": "weights",
    "model.autoencoder": "autoencoder",
    "eval.features.weights": FEATURES,
    "data.source.path": IMAGES,
}  # key of a file or folder -> key of its hash in a row
NAMES = {
    "weights": "float weights",
    "autoencoder": "float autoencoder",
    FEATURES: "feature network",
    IMAGES: "real images",
}
SUBFOLDERS = {"model.weights": "unet", "model.autoencoder": "vae"}  # of a diffusers pipeline

State = tuple[tuple[str, int, int], ...]
_LOADED: dict[tuple[str, str, State], str] = {}


def known_contents(cfg: Any, given: Iterable[str]) -> dict[str, str]:
    """Return the hashes of a command's inputs (networks, images), as far as known, by row key.

    Args:
        cfg: what the command composes to.
        given: keys that a user's overrides set: what they name is loaded, if need be.

    Raises:
        ValueError, OSError: if something that a user names can't be loaded, naming its key.
    """
    hashes = {key: known_hash(cfg.model[key]) for key in ("weights", "autoencoder")}

    for key in sorted(KEYS.keys() & set(given)):
        name, path = KEYS[key], _path_of(cfg, key)
        if hashes.get(name) is None and path is not None:
            hashes[name] = _loaded(name, cfg, () if name == IMAGES else _state(path))
    return {key: value for key, value in hashes.items() if value is not None}


def require_given(overrides: Iterable[str]) -> None:
    """Refuse a float network that is not there, before any row is shown as if it were of it.

    Args:
        overrides: a user's.

    Raises:
        ValueError: naming the override.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        source = value.strip("'\"")
        if key not in SUBFOLDERS or source == "null" or source.startswith("shipped:"):
            continue

        from tdq_exp.models.weights.fill import locate  # it imports torch

        locate(source, SUBFOLDERS[key], key, download=False)


def of_row(row: Mapping[str, Any], name: str) -> Any:
    """Return the hash that a row has under a key of `NAMES`."""
    first, _, then = name.partition(".")
    return (row.get(first) or {}).get(then) if then else row.get(first)


def known_hash(weights: str | None) -> str | None:
    """Return the hash of a net that is shipped, or lies in a file as this package writes them.

    None for any other: it is far away, or its tensors have other names than the network's.
    """
    if weights is None:
        return None

    shipped = weights.startswith("shipped:")
    path = assets.weights(weights) if shipped else Path(weights).expanduser()
    if not shipped and not (path.suffix == ".safetensors" and path.is_file()):
        return None
    state = path.stat()
    return _net_hash(path, shipped, (state.st_mtime_ns, state.st_size))


@lru_cache
def _net_hash(path: Path, shipped: bool, state: tuple[int, int]) -> str | None:
    """Return the hash of a file in a state, which says when to read it again."""
    from tdq_exp.models.weights.save import state_hash  # it imports torch
    from tdq_exp.runtime.tensor_files import read_tensors

    found = read_tensors(path)
    return state_hash(found.tensors) if shipped or found.checked else None


def _path_of(cfg: Any, key: str) -> str | None:
    node = cfg
    for part in key.split("."):
        node = node.get(part)
    return None if node is None else str(node)


def _state(path: str) -> State:
    """Return what says when a file or folder is to be read again; nothing for what is elsewhere."""
    place = Path(path).expanduser()
    listed = sorted(place.rglob("*")) if place.is_dir() else [place]
    stats = ((str(file), file.stat()) for file in listed if file.is_file())
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _loaded(name: str, cfg: Any, state: State) -> str:
    """Return the hash of what is loaded as a run loads it, once for all cells.

    Args:
        name: row's key of its hash.
        cfg: what the command composes to.
        state: of its file; nothing for images, which are not looked through for every cell.
    """
    groups = {FEATURES: ("eval",), IMAGES: ("data", "model")}.get(name, ("model",))
    key = (name, json.dumps([plain(cfg[group]) for group in groups]), state)
    if key not in _LOADED:
        _LOADED[key] = _load(name, cfg)
    return _LOADED[key]


def _load(name: str, cfg: Any) -> str:
    """Return the hash of what is loaded now; arguments as `_loaded`."""
    from tdq_exp.experiment import build as jobs  # it imports torch

    if name == FEATURES:
        return jobs.features_of(plain(cfg)).weights_hash
    if name == IMAGES:
        from tdq_exp.experiment.pipeline import read_data

        return read_data(jobs.build(cfg)).train.content

    job = jobs.build(cfg, source=False)
    if name == "autoencoder":
        return str(job.model.parts()["autoencoder"])
    return job.weights.load(job.model, job.model.build())
