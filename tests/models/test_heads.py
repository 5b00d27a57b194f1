"""Heads by number, not by width: what diffusers' config can't say and no parameter shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel

from tdq_exp.config.compose import compose
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.experiment import build as jobs
from tdq_exp.models.attention import AttentionProcessor
from tdq_exp.models.pixel import DiffusionModel

# LDM's kinds of block, with attention at two widths.
REDUCED: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64, 64), "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "attention_head_dim": 8,
}  # fmt: skip
HEADS = 4


def model(heads: int | None = HEADS, **changes) -> DiffusionModel:
    return DiffusionModel({**REDUCED, **changes}, Schedule(), attention_heads=heads)


def attentions(net: torch.nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Attention)}


def oracle(attention: Attention, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Self-attention with so many heads, one head and one pixel after the other."""
    batch, channels, height, width = x.shape
    h = F.group_norm(
        x,
        attention.group_norm.num_groups,
        attention.group_norm.weight,
        attention.group_norm.bias,
        1e-5,
    )
    h = h.reshape(batch, channels, -1).transpose(1, 2)
    q, k, v = attention.to_q(h), attention.to_k(h), attention.to_v(h)
    each, parts = channels // heads, []
    for head in range(heads):
        part = slice(head * each, (head + 1) * each)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / each**0.5
        parts.append(scores.softmax(-1) @ v[..., part])
    y = attention.to_out[0](torch.cat(parts, -1))
    return x + y.transpose(1, 2).reshape(batch, channels, height, width)


@pytest.mark.parametrize("processor", [None, AttentionProcessor], ids=["diffusers", "ours"])
def test_every_attention_has_the_heads_of_the_model_and_an_unpatched_one_fails(processor):
    net, unpatched = model().build(), UNet2DModel(**REDUCED)
    unpatched.load_state_dict(net.state_dict())
    assert {attention.inner_dim for attention in attentions(net).values()} == {32, 64}
    wrong = 0
    for (name, attention), bare in zip(
        attentions(net).items(), attentions(unpatched).values(), strict=True
    ):
        assert attention.heads == HEADS, name
        for part in (attention, bare):
            if processor is not None:
                part.set_processor(processor(None))
        x = 3 * torch.randn(
            2, attention.inner_dim, 4, 4, generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            torch.testing.assert_close(
                attention(x), oracle(attention, x, HEADS), atol=1e-5, rtol=1e-5
            )
            wrong += (bare(x) - attention(x)).abs().max() > 1e-3
    # One width of a head for all of them is right at one width of the network at most.
    assert (
        wrong
        == sum(attention.inner_dim != HEADS * 8 for attention in attentions(unpatched).values())
        > 0
    )


def test_heads_are_set_again_on_a_network_that_was_saved(tmp_path):
    net = model().build()
    net.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    with torch.no_grad():
        wanted = net.eval()(x, t).sample
        assert (loaded.eval()(x, t).sample - wanted).abs().max() > 1e-4  # saving lost them
        model().load(loaded, str(tmp_path))
        torch.testing.assert_close(loaded(x, t).sample, wanted, atol=1e-5, rtol=1e-5)


def test_a_folder_may_name_any_width_of_a_head_if_the_model_names_their_number(tmp_path):
    model().build().save_pretrained(tmp_path)
    model(attention_head_dim=16).load(model(attention_head_dim=16).build(), str(tmp_path))
    with pytest.raises(ValueError, match="attention_head_dim is 8, wanted 16"):
        bare = model(None, attention_head_dim=16)
        bare.load(bare.build(), str(tmp_path))


def test_heads_that_do_not_divide_a_width_are_refused():
    with pytest.raises(
        ValueError,
        match="attention_heads=5: does not divide down_blocks.0.attentions.0's 32 channels",
    ):
        model(5).build()


def test_the_churches_network_has_the_known_size():
    made = jobs.make(compose(["model=ldm_churches"]), "model.definition")
    with torch.device("meta"):
        net = made.build()
        first_stage = made.autoencoder.build()
    assert sum(parameter.numel() for parameter in net.parameters()) == 294_966_916
    assert sum(parameter.numel() for parameter in first_stage.parameters()) == 83_653_863
    assert {attention.inner_dim: attention.heads for attention in attentions(net).values()} == {
        192: 8,
        384: 8,
        768: 8,
    }
    assert {attention.scale for attention in attentions(net).values()} == {
        24**-0.5,
        48**-0.5,
        96**-0.5,
    }
    # At 32, 16, 8 and 4 on the way down and up, and in the middle; not at 2.
    names = [name.rsplit(".", 2)[0] for name in attentions(net)]
    assert [names.count(f"down_blocks.{level}") for level in range(5)] == [2, 2, 2, 2, 0]
    assert [names.count(f"up_blocks.{level}") for level in range(5)] == [0, 3, 3, 3, 3]
    assert names.count("mid_block") == 1


def test_every_layer_of_the_churches_network_has_a_role():
    made = jobs.make(compose(["model=ldm_churches"]), "model.definition")
    with torch.device("meta"):
        net = made.build()
    roles = made.roles(net)
    leaves = {n for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert roles.keys() == leaves
    assert roles[
        "down_blocks.0.downsamplers.0.conv1"
    ].after_silu  # resampling is a residual block, after its SiLU
