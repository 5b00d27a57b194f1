"""Checks of the arguments of `own_loop`: a mistake is refused in one line, before any work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.config.setting import require
from tdq_exp.models.pixel import DiffusionModel, architecture_of, heads_of

CALIBRATED = "tdq_calibrated"  # attribute of a network whose step sizes have values

# Groups of the configuration that only a run reads, and what to do with a network of one's own.
OF_A_RUN = {
    "seed": "call torch.manual_seed before",
    "fit": "rates are arguments of parameter_groups, and tdq_exp.correct corrects",
    "calibration": "tdq_exp.calibrate takes the samples",
    "launcher": "the training loop is yours",
    "tracker": "the training loop is yours",
}


def require_texts(choices: Mapping[str, Any], overrides: Sequence[Any]) -> None:
    """Refuse choices and overrides that are no texts, do nothing, or describe another network.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in choices.items():
        require(name, value, str)

    if isinstance(overrides, str | Mapping):
        raise ValueError(
            f"overrides={overrides!r}: wanted a list of texts, such as ['tdq.interval.width=32']"
        )
    for value in overrides:
        require("overrides", value, str)
        key = value.lstrip("+~").partition("=")[0]
        group = key.partition(".")[0]
        if group in OF_A_RUN and (key == "seed" or "." in key):
            raise ValueError(f"{value}: would do nothing here: {OF_A_RUN[group]}")
        if value.lstrip("+~").startswith("model.definition.network"):
            raise ValueError(f"{value}: the network is the one that was given; leave this out")


def require_heads(net: nn.Module, model: DiffusionModel) -> None:
    """Refuse attention heads that a network's config does not say: a saved one would lose them.

    Args:
        net: a float network.
        model: the description that a saved network is built of.

    Raises:
        ValueError: naming the first attention that differs, and what to do.
    """
    with torch.device("meta"):
        built = heads_of(model.build())
    for name, (heads, scale) in heads_of(net).items():
        if built[name] != (heads, scale):
            raise ValueError(
                f"{name}: has {heads} heads and the scale {scale:.4g}, and a network built of this"
                f" one's config has {built[name][0]} and {built[name][1]:.4g}; if every attention"
                f" has {heads}, say overrides=['+model.definition.attention_heads={heads}']"
            )


def require_float32(net: nn.Module) -> None:
    """Refuse weights that are not in float32, have no values, or are not finite.

    Raises:
        ValueError: naming the first.
    """
    for name, value in net.state_dict().items():
        if value.is_meta:
            raise ValueError(f"{name}: has no values (it is on the device meta)")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"{name}: is {value.dtype}, wanted float32: call net.float() first")
    require_finite(net)


def require_finite(net: nn.Module) -> None:
    """Refuse a network with a value that is not finite.

    Raises:
        ValueError: naming the first tensor of those.
    """
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: has values that are not finite")


def require_batch(net: nn.Module, batch: Any) -> None:
    """Refuse a batch that a network can't be calibrated on.

    Args:
        net: of `quantize`.
        batch: should be (x_t, t), or (x_t, t, classes).

    Raises:
        ValueError: saying what is wanted.
    """
    config: Any = net.config
    time: Any = net.time
    classes = config["num_class_embeds"] is not None
    wanted = "(x_t, t, classes)" if classes else "(x_t, t)"

    is_list = isinstance(batch, list | tuple) and len(batch) == 2 + classes
    if not is_list or not all(isinstance(value, Tensor) for value in batch):
        raise ValueError(f"calibrate: a batch must be {wanted}, a tuple of tensors")

    # Each sample, and its time step.
    x_t, t, *labels = batch
    channels = config["in_channels"]
    if x_t.dim() != 4 or x_t.shape[1] != channels or not len(x_t) or x_t.dtype != torch.float32:
        raise ValueError(
            f"calibrate: x_t is {x_t.dtype} {list(x_t.shape)}, wanted float32 [B, {channels}, H, W]"
        )
    if not bool(x_t.isfinite().all()):
        raise ValueError("calibrate: x_t has values that are not finite")

    whole = t.dtype not in (torch.bool, torch.complex64) and bool((t == t.long()).all())
    if t.shape != x_t.shape[:1] or not whole:
        raise ValueError(
            f"calibrate: t is {t.dtype} {list(t.shape)}, wanted whole numbers [{len(x_t)}]"
        )
    if int(t.min()) < 0 or int(t.max()) >= time.steps:
        raise ValueError(f"calibrate: t must be from 0 to {time.steps - 1}")
    if labels and labels[0].shape != t.shape:
        raise ValueError(f"calibrate: classes are {list(labels[0].shape)}, wanted [{len(x_t)}]")


def warn_of_one_time(net: nn.Module, times: Sequence[Tensor]) -> None:
    """Warn if all samples of a calibration are of one t: other time steps have other ranges."""
    time: Any = net.time
    seen = torch.cat([t.reshape(-1).cpu() for t in times]).unique()
    if len(seen) == 1 and time.steps > 1:
        warnings.warn(
            f"calibrate: every sample is of t={int(seen)}; show the network samples of all its"
            f" time steps, 0 to {time.steps - 1}, or its step sizes fit this one alone",
            stacklevel=3,
        )


def require_uncorrected(net: nn.Module) -> None:
    """Refuse to change a network whose correction was measured on what it is now.

    Raises:
        ValueError: what to do.
    """
    if "correction" in dict(net.named_children()):
        raise ValueError("the network is corrected already; calibrate and train it before that")


def require_source(net: nn.Module, float_net: nn.Module) -> None:
    """Refuse a network that another one was not made of, by its class and arguments.

    Weights are not compared: those of the quantized network may have been trained since.

    Args:
        net: of `quantize`.
        float_net: should be what was given to it.

    Raises:
        TypeError: for a network of another class.
        ValueError: saying what differs.
    """
    theirs = architecture_of(float_net)
    require_float32(float_net)
    if hasattr(float_net, "tdq_config"):
        raise ValueError("float_net: is a quantized network, wanted the float one")
    for key, value in architecture_of(net).items():
        if theirs.get(key) != value:
            raise ValueError(f"float_net: its {key} is {theirs.get(key)}, the network's {value}")
    if heads_of(float_net) != heads_of(net):
        raise ValueError("float_net: its attentions have other heads than the network's")
    if next(float_net.parameters()).device != next(net.parameters()).device:
        raise ValueError("float_net: is on another device than the network")


def require_images(net: nn.Module, images: Any, classes: Any) -> None:
    """Refuse images that a network's correction can't be measured on.

    Args:
        net: of `quantize`.
        images: should be `[N, C, H, W]` in [-1, 1].
        classes: should be `[N]` for a class-conditional network, else None.

    Raises:
        ValueError: saying what is wanted.
    """
    config: Any = net.config
    channels = config["in_channels"]
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.dim() != 4:
        raise ValueError(f"correct: images must be a float32 tensor [N, {channels}, H, W]")
    size = config["sample_size"]
    shape = [channels, *(size if isinstance(size, list | tuple) else (size, size))]
    if list(images.shape[1:]) != shape or not len(images):
        raise ValueError(f"correct: images are {list(images.shape)}, wanted {['N', *shape]}")
    if not bool((images.abs() <= 1).all()):
        raise ValueError("correct: images must be in [-1, 1]")

    if (config["num_class_embeds"] is None) != (classes is None):
        wanted = "no classes" if classes is not None else "classes"
        raise ValueError(f"correct: this network takes {wanted}")
    if classes is not None and (
        not isinstance(classes, Tensor) or classes.shape != images.shape[:1]
    ):
        raise ValueError(f"correct: classes must be a tensor [{len(images)}]")


def require_rates(**rates: float | None) -> None:
    """Refuse learning rates and decays that are negative, not finite, or no numbers.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in rates.items():
        if value is not None:
            require(name, value, float, low=0)


def require_calibrated(net: nn.Module, *_: Any) -> None:
    """Refuse a network whose step sizes were never set; also a hook before its forward pass.

    Raises:
        ValueError: saying what to call.
    """
    if not getattr(net, CALIBRATED, False):
        raise ValueError(
            "the network's step sizes have no values yet: call tdq_exp.calibrate(net, batches), or"
            " load a state dict"
        )


def now_calibrated(net: nn.Module) -> None:
    """Note that a network's step sizes have values."""
    setattr(net, CALIBRATED, True)


def calibrated_if_whole(net: nn.Module, keys: Any) -> None:
    """Note the same after a state dict with nothing missing: a hook of `load_state_dict`.

    With `strict=False` the float network's weights, say, are loaded without a complaint: its keys
    are others, so nothing is.

    Args:
        net: of `quantize`.
        keys: those that were missing or left over.
    """
    if not keys.missing_keys:
        now_calibrated(net)


@contextmanager
def callable_meanwhile(net: nn.Module) -> Iterator[None]:
    """Let a network be called while its step sizes get their values; as before after an error."""
    before = getattr(net, CALIBRATED, False)
    now_calibrated(net)
    try:
        yield
    except BaseException:
        setattr(net, CALIBRATED, before)
        raise


def path_of(what: Any, name: str) -> Path:
    """Return a path, its home folder filled in.

    Raises:
        ValueError: for what is no path, or can be none.
    """
    if not isinstance(what, str | Path) or not str(what) or "\0" in str(what):
        raise ValueError(f"{name}={what!r}: is no path")
    return Path(what).expanduser()
