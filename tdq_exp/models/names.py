"""Names of weights: from the original networks', and diffusers' first ones, to diffusers'.

Two ways of counting. The original networks count their up levels by resolution and diffusers by execution: up.i is
up_blocks.(L-1-i) of L levels. Their attention is made of 1x1 convolutions and diffusers' of linear layers, [C, C, 1, 1]
and [C, C]; so was diffusers' own at first, under other names, which the hub's DDPM weights still have.

References:
    DDIM's network: https://github.com/ermongroup/ddim (models/diffusion.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tdq_exp.models.inert_pickle import CheckpointError

_ORIGINAL_MODULES = {
    r"temb\.dense\.0": "time_embedding.linear_1",
    r"temb\.dense\.1": "time_embedding.linear_2",
    r"norm_out": "conv_norm_out",
    r"mid\.block_1": "mid_block.resnets.0",
    r"mid\.attn_1": "mid_block.attentions.0",
    r"mid\.block_2": "mid_block.resnets.1",
    r"(?P<side>down|up)\.(?P<level>\d+)\.block\.(?P<index>\d+)": "{side}_blocks.{level}.resnets.{index}",
    r"(?P<side>down|up)\.(?P<level>\d+)\.attn\.(?P<index>\d+)": "{side}_blocks.{level}.attentions.{index}",
    r"(?P<side>down)\.(?P<level>\d+)\.downsample": "{side}_blocks.{level}.downsamplers.0",
    r"(?P<side>up)\.(?P<level>\d+)\.upsample": "{side}_blocks.{level}.upsamplers.0",
}
_ORIGINAL_LAYERS = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}
_FIRST_DIFFUSERS_LAYERS = {"attentions": {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}}


def diffusers_names(source: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a state dict in the original's names, or in diffusers' first ones; other names stay as they are."""
    original = any(name.startswith("temb.") for name in state)
    levels = 1 + max((int(match[1]) for name in state if (match := re.match(r"up\.(\d+)\.", name))), default=-1)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        new_name = _from_original(name, levels) if original else _rename_layer(name, _FIRST_DIFFUSERS_LAYERS)
        if new_name in renamed:
            raise CheckpointError(f"{source}: two keys for {new_name}, one of them is {name}")
        renamed[new_name] = tensor
    return renamed


def _from_original(name: str, levels: int) -> str:
    """The name in diffusers of a key of the original network with so many levels."""
    for pattern, module in _ORIGINAL_MODULES.items():
        if match := re.match(rf"{pattern}\.", name):
            place = match.groupdict()
            if place.get("side") == "up":
                place["level"] = str(levels - 1 - int(place["level"]))
            return _rename_layer(f"{module.format(**place)}.{name[match.end() :]}", _ORIGINAL_LAYERS)
    return name


def _rename_layer(name: str, layers: Mapping[str, Mapping[str, str]]) -> str:
    """Renames `<...>.<kind>.<index>.<layer>.<parameter>` by the table of its kind."""
    match = re.fullmatch(r"(.*\.(\w+)\.\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        return name
    module, kind, layer, parameter = match.groups()
    return f"{module}.{layers.get(kind, {}).get(layer, layer)}.{parameter}"
