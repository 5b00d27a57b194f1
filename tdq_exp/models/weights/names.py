"""Names of weights: from the original networks', and diffusers' first ones, to diffusers'.

Two ways of counting. The original networks count their up levels by resolution and diffusers by
execution: up.i is up_blocks.(L-1-i) of L levels. Their attention is made of 1x1 convolutions and
diffusers' of linear layers, [C, C, 1, 1] and [C, C]; so was diffusers' own at first, under other
names, which the hub's DDPM weights still have.

References:
    DDIM's network: https://github.com/ermongroup/ddim (models/diffusion.py).
    Latent diffusion: https://github.com/CompVis/latent-diffusion
        (ldm/modules/diffusionmodules/openaimodel.py, model.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tdq_exp.models.weights.inert_pickle import CheckpointError

_ORIGINAL_MODULES = {
    r"temb\.dense\.0": "time_embedding.linear_1",
    r"temb\.dense\.1": "time_embedding.linear_2",
    r"norm_out": "conv_norm_out",
    r"mid\.block_1": "mid_block.resnets.0",
    r"mid\.attn_1": "mid_block.attentions.0",
    r"mid\.block_2": "mid_block.resnets.1",
    r"(?P<side>down|up)\.(?P<level>\d+)\.block\.(?P<index>\d+)": (
        "{side}_blocks.{level}.resnets.{index}"
    ),
    r"(?P<side>down|up)\.(?P<level>\d+)\.attn\.(?P<index>\d+)": (
        "{side}_blocks.{level}.attentions.{index}"
    ),
    r"(?P<side>down)\.(?P<level>\d+)\.downsample": "{side}_blocks.{level}.downsamplers.0",
    r"(?P<side>up)\.(?P<level>\d+)\.upsample": "{side}_blocks.{level}.upsamplers.0",
}
_ORIGINAL_LAYERS = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
    },
}
_FIRST_DIFFUSERS_LAYERS = {
    "attentions": {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
}


# CompVis' U-Net: what a module holds says what it is.
_COMPVIS_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_COMPVIS_KINDS = {
    "resnets": {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    "attentions": {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"},
    "samplers": {"op": "conv", "conv": "conv"},
}


def diffusers_names(
    source: str, state: Mapping[str, torch.Tensor], net: nn.Module
) -> dict[str, torch.Tensor]:
    """Rename a state dict from an original's names, or diffusers' first ones; others stay.

    Args:
        source: where it is from, for messages.
        state: weights by name.
        net: the network that they are for; its architecture is what CompVis' names count by.

    Raises:
        CheckpointError: if two names mean one weight.
    """
    renaming = _renaming(state, net)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for new_name, part in _divided(renaming(name), tensor, net):
            if new_name in renamed:
                raise CheckpointError(f"{source}: two keys for {new_name}, one of them is {name}")
            renamed[new_name] = part
    return renamed


def _renaming(state: Mapping[str, torch.Tensor], net: nn.Module) -> Callable[[str], str]:
    """Return the function that turns a name into diffusers'.

    The names of the state dict tell which network it is of.
    """
    if any(name.startswith("temb.") for name in state):
        return partial(_from_original, levels=_levels(state, "up."))
    if any(name.startswith("encoder.down.") for name in state):
        return partial(_from_autoencoder, levels=_levels(state, "decoder.up."))
    if any(name.startswith("input_blocks.") for name in state):
        config: Mapping[str, Any] = getattr(net, "config", {})
        return partial(_from_compvis, layers=int(config.get("layers_per_block", 1)))
    return partial(_rename_layer, layers=_FIRST_DIFFUSERS_LAYERS)


def _levels(names: Iterable[str], prefix: str) -> int:
    """Return the number of levels, counted by the names that begin with `<prefix><level>.`."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def _from_autoencoder(name: str, levels: int) -> str:
    """Return the name in diffusers of a key of CompVis' autoencoder."""
    side, dot, rest = name.partition(".")
    return (
        f"{side}.{_from_original(rest, levels)}" if dot and side in ("encoder", "decoder") else name
    )


def _from_compvis(name: str, layers: int) -> str:
    """Return the name in diffusers of a key of CompVis' U-Net with so many residual blocks a level.

    Blocks are counted through: input_blocks.0 is the first convolution, then come the residual
    blocks of a level, with their attentions, and its downsampling; output_blocks are `layers + 1` a
    level, the last of them with its upsampling.
    """
    layer, _, parameter = name.rpartition(".")
    if layer in _COMPVIS_TOP:
        return f"{_COMPVIS_TOP[layer]}.{parameter}"

    match = re.fullmatch(r"(input|output|middle)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)", layer)
    if match is None:
        return name
    side, number, inside, last = match.groups()

    kind, new = next(
        ((kind, table[last]) for kind, table in _COMPVIS_KINDS.items() if last in table), ("", "")
    )
    if not kind:
        return name

    if side == "middle":  # residual block, attention, residual block
        return f"mid_block.{kind}.{int(number) // 2}.{new}.{parameter}"

    # The last of a level changes its size; the first input block is conv_in.
    level, index = divmod(int(number) - (side == "input"), layers + 1)
    way = "down" if side == "input" else "up"
    if index == layers if side == "input" else inside != "0" and kind != "attentions":
        kind, index = f"{way}samplers", 0

    return f"{way}_blocks.{level}.{kind}.{index}.{new}.{parameter}"


def _divided(name: str, tensor: torch.Tensor, net: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return q, k and v of a `qkv` layer; any other weight as it is.

    Its rows are h heads of (q, k, v), each C / h rows.
    """
    match = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name)
    attention: Any = dict(net.named_modules()).get(match[1]) if match else None
    if match is None or attention is None or tensor.ndim == 0:
        return [(name, tensor)]

    heads: int = attention.heads
    if len(tensor) % (3 * heads):
        return [(name, tensor)]

    rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    parts = [rows[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)]
    return [
        (f"{match[1]}.to_{part}.{match[2]}", value)
        for part, value in zip("qkv", parts, strict=True)
    ]


def _from_original(name: str, levels: int) -> str:
    """Return the name in diffusers of a key of the original network with so many levels."""
    for pattern, module in _ORIGINAL_MODULES.items():
        if match := re.match(rf"{pattern}\.", name):
            place = match.groupdict()
            if place.get("side") == "up":
                place["level"] = str(levels - 1 - int(place["level"]))
            return _rename_layer(
                f"{module.format(**place)}.{name[match.end() :]}", _ORIGINAL_LAYERS
            )
    return name


def _rename_layer(name: str, layers: Mapping[str, Mapping[str, str]]) -> str:
    """Rename `<...>.<kind>.<index>.<layer>.<parameter>` by the table of its kind."""
    match = re.fullmatch(r"(.*\.(\w+)\.\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        return name
    module, kind, layer, parameter = match.groups()
    return f"{module}.{layers.get(kind, {}).get(layer, layer)}.{parameter}"
