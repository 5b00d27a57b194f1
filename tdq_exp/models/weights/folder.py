"""A diffusers folder: where in it a network lies, and whether it is of the wanted architecture."""

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from tdq_exp.models.weights import compvis
from tdq_exp.models.weights.inert_pickle import CheckpointError, read_tensors
from tdq_exp.models.weights.paths import require_file

# Keys of a diffusers config that don't change what a weight means: `dropout` acts in training only;
# the rest is written by diffusers' EMA beside the architecture.
_NOT_ARCHITECTURE = frozenset(
    [
        "dropout",
        "decay",
        "min_decay",
        "optimization_step",
        "update_after_step",
        "use_ema_warmup",
        "inv_gamma",
        "power",
    ]
)


def place_of(folder: Path, subfolder: str, ema: bool = False) -> Path:
    """Return the folder itself, or the subfolder, whichever has a config.

    Args:
        folder: of a network, or of a pipeline.
        subfolder: `unet` or `vae`.
        ema: take the folder of averages, `unet_ema`, where there is one.

    Raises:
        CheckpointError: if there is no config.
    """
    averages = (folder / f"{subfolder}_ema",) if ema else ()
    for place in (folder, *averages, folder / subfolder):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{folder}: no diffusers folder, it has neither config.json nor {subfolder}/config.json"
    )


def which_weights(source: str, ema: bool) -> str | None:
    """Return which of its sets of weights a source gives, for the row; None if it has only one.

    Args:
        source: of a network, as `load_weights` was given it.
        ema: likewise.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"{place_of(path, 'unet', ema).name}/"
    if not path.is_file() or path.suffix == ".safetensors":
        return None

    kinds: list[str] = []

    def pick(tree: Any) -> dict[str, Any]:
        """Note which kind of file it is; no tensor is read."""
        state = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
        if isinstance(tree, list) or (isinstance(state, dict) and compvis.is_whole(state)):
            kinds.append("EMA" if ema else "raw")
        return {}

    read_tensors(path, pick)
    return kinds[0] if kinds else None


def config_of(path: Path) -> dict[str, Any]:
    """Return a config, plain.

    Raises:
        CheckpointError: if it is damaged.
    """
    require_file(path)
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON config ({error})") from error


def require_same_architecture(net: torch.nn.Module, path: Path, overruled: Collection[str]) -> None:
    """Compare a folder's config with the network's; absent keys have the class's defaults.

    Args:
        net: the network that is to be filled.
        path: of the config.
        overruled: keys that need not agree.

    Raises:
        CheckpointError: naming the key that differs.
    """
    found = config_of(path)
    class_name = type(net).__name__
    if found.get("_class_name", class_name) != class_name:
        raise CheckpointError(f"{path}: _class_name is {found['_class_name']}, wanted {class_name}")

    parameters = inspect.signature(type(net).__init__).parameters
    wanted: Mapping[str, Any] = getattr(net, "config", {})

    for key in sorted(parameters.keys() & wanted.keys() | found.keys()):
        if key.startswith("_") or key in _NOT_ARCHITECTURE or key in overruled:
            continue

        # A key that the class does not know may be there if it switches nothing on.
        if key not in parameters and found[key] not in (None, False):
            raise CheckpointError(f"{path}: {key} is {found[key]}, wanted no such key")
        if key not in parameters:
            continue

        has, wants = (
            _comparable(value)
            for value in (found.get(key, parameters[key].default), wanted.get(key))
        )

        # Where one of the two names no size, none is meant: all layers are convolutional or attend
        # to what there is.
        if has != wants and not (key == "sample_size" and None in (has, wants)):
            raise CheckpointError(f"{path}: {key} is {has}, wanted {wants}")


def _comparable(value: Any) -> Any:
    """Return a value of a config in the form that today's diffusers writes.

    JSON has no tuples, and the first releases had a prefix on the blocks' names.
    """
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value.removeprefix("UNetRes") if isinstance(value, str) else value
