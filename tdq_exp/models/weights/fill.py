"""Fill a network of diffusers with weights, whatever saved them, and hash their content.

Sources:

    PATH/ or PATH/unet/      a diffusers folder: config.json, and weights as .safetensors or .bin;
                             an autoencoder's lies in vae/, averages (EMA) in PATH/unet_ema/
    owner/name               the same on the model hub
    PATH.safetensors         a state dict in diffusers' names: this project's own files
    PATH (.ckpt, .pth, ...)  a PyTorch file: a state dict, one inside {"state_dict": ...}, or the
                             training list [network, optimiser, epoch, step, EMA] of the original
                             DDIM code; names of diffusers or of the original, with or without the
                             `module.` of a data-parallel network; or all networks of CompVis'
                             latent diffusion (see `compvis`)

A load is strict: each key of the file goes to one of the network, or is written down in a
`NOT_WEIGHTS`. No file is executed (see `inert_pickle`). Weights are cast to the network's type, and
hashed after that: `load_weights` returns what `state_hash(net.state_dict())` would, for every
source.

References:
    Original network and training list: https://github.com/ermongroup/ddim (models/diffusion.py,
        runners/diffusion.py).
    Original weights as plain state dicts: https://github.com/pesser/pytorch_diffusion.
"""

import inspect
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from tdq_exp.models.weights import compvis
from tdq_exp.models.weights.folder import config_of, place_of, require_same_architecture
from tdq_exp.models.weights.inert_pickle import CheckpointError, StoredTensor, read_tensors
from tdq_exp.models.weights.match import match
from tdq_exp.models.weights.names import diffusers_names
from tdq_exp.models.weights.paths import expanded, require_file
from tdq_exp.models.weights.save import save_weights, state_hash
from tdq_exp.runtime import hub
from tdq_exp.runtime.tensor_files import read_tensors as read_safetensors

__all__ = [
    "NOT_WEIGHTS",
    "CheckpointError",
    "load_autoencoder",
    "load_weights",
    "locate",
    "save_weights",
    "state_hash",
]

# Keys that a state dict may hold and no network needs. `logvar`: the original's `bayesian` type
# registers it, and its forward pass never reads it.
NOT_WEIGHTS = frozenset({"logvar"})

# Of an autoencoder's config: how large its images were, and how its latents are scaled, which
# `load_autoencoder` reads.
_NOT_THE_AUTOENCODERS = frozenset(["sample_size", "scaling_factor", "force_upcast"])

SCHEDULER = "scheduler_config.json"
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def load_weights(
    net: torch.nn.Module, source: str, *, ema: bool = True, overruled: Collection[str] = frozenset()
) -> str:
    """Fill a network, all of it, and return the hash of its weights.

    Args:
        net: the network to fill; for folders and the hub a diffusers model, whose config must agree
            with theirs.
        source: path of a file or folder, or an id on the model hub (see the module's docstring).
        ema: take the exponential moving average, not the raw weights, of a source that has both: a
            training list (elements 4 and 0) or a folder (`unet_ema/` and `unet/`). Sources with
            one set of weights have no say in which it is.
        overruled: keys of a folder's config that the caller sets by other means, so that they need
            not agree.

    Returns:
        The `state_hash` of the network's weights after the load.

    Raises:
        CheckpointError: one line, that begins with the source, if it can't be found or read, was
            made for another architecture, or has missing, left-over or misshapen keys. The network
            is then as it was.
    """
    path = _located(source, _subfolder(net))
    found = (
        _read_folder(net, path, overruled, ema)
        if path.is_dir()
        else _read_file(path, ema, _subfolder(net))
    )
    state = match(source, diffusers_names(source, found, net), net.state_dict())
    net.load_state_dict(state, strict=True)
    return state_hash(state)


def load_autoencoder(net: torch.nn.Module, source: str, scale: float | None = None) -> str:
    """Fill an autoencoder and its scale (`kl.*` and `scale`), and return the hash of its weights.

    Args:
        net: see `codec.ScaledAutoencoder`.
        source: as for `load_weights`. A diffusers folder (PATH/ or PATH/vae/) has the scale in its
            config.
        scale: in place of the source's.

    Raises:
        CheckpointError: as `load_weights`; or if neither the source nor the caller says what the
            scale is.
    """
    path, kl = _located(source, "vae"), net.get_submodule("kl")
    ours = _read_file(path, True, "vae").get("scale") if path.suffix == ".safetensors" else None

    # The scale: the caller's, else the one that the source names.
    advice = "set model.definition.autoencoder.scale"
    used = scale
    if used is None:
        # A tensor of another size is refused below, with the other keys.
        own = 1.0 if ours is None or ours.numel() != 1 else float(ours)
        used = _scale_of(kl, path) if ours is None else own
        if used is None:
            raise CheckpointError(f"{source}: names no scale of the latents; {advice}")

        if not 0 < used < math.inf:
            raise CheckpointError(f"{source}: the scale of its latents is {used}; {advice}")

    # Our own file holds the scale as well; others hold the autoencoder alone.
    if ours is not None:
        load_weights(net, source)
    else:
        load_weights(kl, source, overruled=_NOT_THE_AUTOENCODERS)
    net.get_buffer("scale").fill_(used)
    return state_hash(net.state_dict())


def _scale_of(kl: torch.nn.Module, path: Path) -> float | None:
    """Return what a source of an autoencoder says about the scale of its latents, if it does."""
    if path.suffix == ".safetensors":
        return None
    if not path.is_dir():
        return _stored_scale(path)
    default = inspect.signature(type(kl).__init__).parameters["scaling_factor"].default
    config = place_of(path, "vae") / "config.json"
    return _number(config, "scaling_factor", config_of(config).get("scaling_factor", default))


def _number(path: Path, key: str, value: Any) -> float:
    """Return what a file says of the scale as a number.

    Raises:
        CheckpointError: naming the file and its key.
    """
    with suppress(OverflowError):  # an integer of hundreds of digits
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    raise CheckpointError(
        f"{path}: {key} is {value!r:.40}, wanted a number; set model.definition.autoencoder.scale"
    )


def _stored_scale(path: Path) -> float | None:
    """Return the scale in a file of CompVis' latent diffusion, a tensor or a number, or None."""
    numbers: list[float] = []

    def pick(tree: Any) -> dict[str, Any]:
        state = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
        value = state.get(compvis.SCALE) if isinstance(state, dict) else None
        if isinstance(value, int | float):
            numbers.append(_number(path, compvis.SCALE, value))
        return {} if value is None or numbers else {compvis.SCALE: value}

    found = read_tensors(path, pick).get(compvis.SCALE)
    if found is None:
        return numbers[0] if numbers else None
    if found.numel() != 1:
        raise CheckpointError(f"{path}: {compvis.SCALE} holds {found.numel()} numbers, wanted one")
    return _number(path, compvis.SCALE, found.item())


def _read_file(path: Path, ema: bool, part: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a network, `unet` or `vae`, in a file, without prefixes."""
    require_file(path)
    if path.suffix != ".safetensors":
        return read_tensors(path, lambda tree: _state_of(path, tree, ema, part))
    try:
        return _without_module(read_safetensors(path).tensors)
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: truncated, corrupt or not safetensors; {reason}") from error


def _state_of(path: Path, tree: Any, ema: bool, part: str) -> dict[str, Any]:
    """Return the state dict in the object of a PyTorch file."""

    # A training state: a list, with the averaged weights last.
    if isinstance(tree, list):
        if len(tree) not in (4, 5):
            raise CheckpointError(
                f"{path}: a list of {len(tree)}, where a training state has 4 elements,"
                " or 5 with EMA"
            )

        if ema and len(tree) == 4:
            raise CheckpointError(
                f"{path}: a training state without EMA weights; ask for its raw ones (ema=False)"
            )
        tree = tree[4] if ema else tree[0]

    # A checkpoint with the state dict inside, or the state dict itself.
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        if ema and (others := _averages_beside(tree)):
            raw = ", or ask for the raw ones (model.ema=false)" if part == "unet" else ""
            raise CheckpointError(
                f"{path}: holds averages beside its state_dict ({', '.join(others[:3])}); save the"
                f" weights that are meant as a file of their own{raw}"
            )
        tree = tree["state_dict"]
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise CheckpointError(f"{path}: holds no state dict")

    if compvis.is_whole(tree):
        return compvis.part_of(path, tree, part, ema)
    return compvis.without_loss(tree) if compvis.is_autoencoder(tree) else _without_module(tree)


def _averages_beside(tree: Mapping[Any, Any]) -> list[str]:
    """Return the keys beside `state_dict` that hold other weights of the same names, or an EMA."""
    state = tree["state_dict"]

    def same_names(value: Any) -> bool:
        return isinstance(value, dict) and bool(state) and state.keys() <= value.keys()

    def tensors(value: Any, depth: int = 3) -> bool:
        parts = list(value.values()) if isinstance(value, dict) else value
        nested = depth > 0 and isinstance(parts, list | tuple)
        return isinstance(value, StoredTensor) or (
            nested and any(tensors(part, depth - 1) for part in parts)
        )

    return [
        str(key)
        for key, value in tree.items()
        if key != "state_dict"
        and (
            same_names(value) or ("ema" in re.split("[^a-z]", str(key).lower()) and tensors(value))
        )
    ]


def _without_module(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take the `module.` of a data-parallel network off the names, and drop `NOT_WEIGHTS`."""
    parallel = all(name.startswith("module.") for name in state)
    named = {
        name.removeprefix("module.") if parallel else name: value for name, value in state.items()
    }
    return {name: value for name, value in named.items() if name not in NOT_WEIGHTS}


def _subfolder(net: torch.nn.Module) -> str:
    """Return where a pipeline's folder has such a network, next to others."""
    return "vae" if type(net).__name__ == "AutoencoderKL" else "unet"


def locate(source: str, subfolder: str, key: str = "", download: bool = True) -> Path | None:
    """Return the file or folder that a source means, downloaded if it is a network of the hub.

    Args:
        source: see the module's docstring.
        subfolder: where a pipeline's folder has such a network: `unet` or `vae`.
        key: of the configuration, for messages.
        download: whether a network of the hub is fetched; None is returned if it is not.

    Raises:
        CheckpointError: if there is no such file or folder, or it can't be read as one.
    """
    named = f"{key}={source}" if key else source
    path = expanded(source)

    if path.is_dir():
        place_of(path, subfolder)
        return path
    if path.exists():
        require_file(path)
        return path
    if _HUB_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        return _download(source, subfolder) if download else None
    raise CheckpointError(f"{named}: no such file or folder")


def _located(source: str, subfolder: str) -> Path:
    """Return the file or folder that a source means, downloaded if need be."""
    path = locate(source, subfolder)
    assert path is not None
    return path


def _read_folder(
    net: torch.nn.Module, folder: Path, overruled: Collection[str], ema: bool
) -> dict[str, torch.Tensor]:
    """Return the state dict of a diffusers folder, whose config agrees with the network's."""
    place = place_of(folder, _subfolder(net), ema)
    require_same_architecture(net, place / "config.json", overruled)
    for name in _WEIGHT_FILES:
        if (place / name).is_file():
            return _read_file(place / name, True, _subfolder(net))
    raise CheckpointError(f"{place}: has neither {' nor '.join(_WEIGHT_FILES)}")


def _fetch_scheduler(repository: str) -> None:
    """Fetch what a pipeline of the hub says of its noise and target, where it says anything.

    It lies beside the network then, where `process.require_same_process` looks for it.
    """
    for place in ("scheduler", None):
        with suppress(EntryNotFoundError):  # off line, too: nothing is said
            hf_hub_download(repository, SCHEDULER, subfolder=place)
            return


def _download(repository: str, subfolder: str) -> Path:
    """Return the local folder of a network on the model hub, downloaded if need be."""
    key = "autoencoder" if subfolder == "vae" else "weights"
    advice = f"give a local file or folder with model.{key}=PATH"
    hub.prepare()
    try:
        try:
            folder = Path(hf_hub_download(repository, "config.json")).parent
            inside = None
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            folder = Path(hf_hub_download(repository, "config.json", subfolder=subfolder)).parent
            inside = subfolder
        try:
            hf_hub_download(repository, _WEIGHT_FILES[0], subfolder=inside)
        except EntryNotFoundError:
            # Also when off line: the cache may hold the other file.
            hf_hub_download(repository, _WEIGHT_FILES[1], subfolder=inside)
        if subfolder == "unet":
            _fetch_scheduler(repository)
        return folder
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{repository}: no local path, and no model of this id on the hub; {advice}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no local path, and the hub can't be reached; {advice}"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no diffusers network in this model of the hub; {advice}"
        ) from error
    except (HTTPError, OSError) as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
        raise CheckpointError(f"{repository}: no local path, and {reason}; {advice}") from error
