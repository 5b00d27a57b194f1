"""Arguments of diffusers' networks: refused with their key, before a network is made of them.

diffusers checks little of what it is given: a misspelt key is a traceback, a negative width is one
some calls later, and a width of 10^9 asks for all the memory of the machine.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from tdq_exp.config.setting import require
from tdq_exp.runtime.environment import memory_bytes

# A number beyond these is probably a typo, or a trap.
MOST_LEVELS = 16
MOST_LAYERS = 64
MOST = 1 << 16  # of every other whole number: channels, sides, groups, heads

COUNTS = ("sample_size", "in_channels", "out_channels", "latent_channels", "norm_num_groups")
WIDTHS = ("block_out_channels",)
BLOCKS = ("down_block_types", "up_block_types")

# diffusers takes any other word for one of these.
CHOICES = {
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}

T = TypeVar("T")


def check_network(network: Any, kind: type[nn.Module], key: str) -> None:
    """Refuse arguments that a network of diffusers does not take, or can't be meant.

    Args:
        network: the arguments, plain values.
        kind: class of the network.
        key: of the arguments, for messages: `model.definition.network`.

    Raises:
        ValueError: one line that names the key.
    """
    if not isinstance(network, Mapping):
        raise ValueError(f"{key}={network}: must hold the arguments of {kind.__name__}")

    taken = dict(inspect.signature(kind.__init__).parameters)
    del taken["self"]
    for name, value in network.items():
        if name not in taken:
            near = difflib.get_close_matches(str(name), taken, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}.{name}: {kind.__name__} takes no such key{hint}")
        _check_value(value, name, f"{key}.{name}")
        _check_kind(value, taken[name].default, f"{key}.{name}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{key}.{name}={value}: choose {' or '.join(CHOICES[name])}")

    # Without these two a description has no shape.
    for name in ("sample_size", "in_channels"):
        if not isinstance(network.get(name), int):
            raise ValueError(f"{key}.{name}={network.get(name)}: must be a whole number")


def _check_value(value: Any, name: str, key: str) -> None:
    """Refuse a value that no argument of a network can have."""
    if name in (*WIDTHS, *BLOCKS):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{key}={value}: must be a list, with one entry for each level")
        if not 1 <= len(value) <= MOST_LEVELS:
            raise ValueError(f"{key}={value}: must have from 1 to {MOST_LEVELS} entries")
        kind = int if name in WIDTHS else str
        for entry in value:
            require(key, entry, kind, **({"low": 1, "most": MOST} if kind is int else {}))
        return

    # Whole numbers, then all others.
    if name in COUNTS and value is not None:
        require(key, value, int, low=1, most=MOST)
    elif name == "layers_per_block":
        require(key, value, int, low=1, most=MOST_LAYERS)
    elif name == "dropout":
        require(key, value, float, low=0, below=1)
    elif name == "norm_eps":
        require(key, value, float, above=0, below=1)
    elif isinstance(value, int) and not isinstance(value, bool):
        require(key, value, int, low=0, most=MOST)
    elif isinstance(value, float):
        require(key, value, float)


def _check_kind(value: Any, default: Any, key: str) -> None:
    """Refuse a value of another kind than its default, where diffusers would take it as a truth."""
    if isinstance(default, bool):
        require(key, value, bool)
    elif isinstance(value, bool) and default is not None:
        raise ValueError(
            f"{key}={value}: must be {'a text' if isinstance(default, str) else 'a number'}"
        )


def constructed(make: Callable[[], T], key: str) -> T:
    """Return what diffusers makes of its arguments, its complaints in one line.

    Args:
        make: calls the constructor, or the network.
        key: of the arguments, for messages.

    Raises:
        ValueError: if the arguments contradict each other; one line that names the key.
    """
    try:
        return make()
    except MemoryError:
        raise
    except Exception as error:  # of any type: assertions, divisions by zero, missing attributes
        raise ValueError(f"{key}: {first_line(error)}") from error


def require_memory(network: Mapping[str, Any], kind: type[nn.Module], key: str) -> None:
    """Refuse a network whose weights alone are larger than the machine's memory.

    Raises:
        ValueError: one line that names the key.
    """
    arguments = json.dumps(dict(network))
    wanted = _weight_bytes(kind, arguments, key)  # type: ignore[arg-type]  # hash of a class
    if wanted > memory_bytes():
        raise ValueError(
            f"{key}: its weights take {wanted / 1e9:.0f} GB, and this machine has"
            f" {memory_bytes() / 1e9:.0f} GB"
        )


@lru_cache(maxsize=64)
def _weight_bytes(kind: Callable[..., nn.Module], arguments: str, key: str) -> int:
    """Return the bytes of a network's weights, without making them; arguments as JSON."""
    with torch.device("meta"):
        net = constructed(lambda: kind(**json.loads(arguments)), key)
    return sum(p.numel() * p.element_size() for p in net.parameters())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
