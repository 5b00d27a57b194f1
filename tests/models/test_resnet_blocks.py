"""Chains of diffusers' residual U-Nets: each names modules that are there, in their order."""

import pytest
import torch
from torch import nn

from tdq_exp.models.resnet_blocks import unet_chains
from tests.quant.builders import inputs, load_model, make_net, make_recipe


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny").build().eval()


def test_every_chain_names_modules_of_the_right_kind(tiny):
    chains = unet_chains(tiny)
    assert chains.norms and chains.upsamples
    for chain in chains.norms:
        assert isinstance(tiny.get_submodule(chain.norm), nn.GroupNorm)
        assert isinstance(tiny.get_submodule(chain.activation), nn.SiLU)
        assert isinstance(tiny.get_submodule(chain.reader), nn.Conv2d)
        assert all(isinstance(tiny.get_submodule(name), nn.Dropout) for name in chain.passed)
    for chain in chains.upsamples:
        assert isinstance(tiny.get_submodule(chain.conv), nn.Conv2d)


def test_all_norms_but_those_of_attention_are_in_a_chain(tiny):
    norms = {name for name, module in tiny.named_modules() if isinstance(module, nn.GroupNorm)}
    attention = {name for name in norms if "attentions" in name}
    assert attention and {chain.norm for chain in unet_chains(tiny).norms} == norms - attention


@torch.no_grad()
def test_a_reader_reads_the_silu_of_its_norm_and_nothing_else(tiny):
    outputs, read = {}, {}
    handles = []
    for chain in unet_chains(tiny).norms:

        def keep(module, args, y, name=chain.norm):
            outputs[name] = y

        def look(module, args, name=chain.reader):
            read[name] = args[0]

        handles.append(tiny.get_submodule(chain.norm).register_forward_hook(keep))
        handles.append(tiny.get_submodule(chain.reader).register_forward_pre_hook(look))
    tiny(*inputs(2))
    for handle in handles:
        handle.remove()
    for chain in unet_chains(tiny).norms:
        assert torch.equal(read[chain.reader], nn.functional.silu(outputs[chain.norm]))


def test_a_quantized_network_has_the_same_chains(tiny):
    assert unet_chains(make_net(make_recipe("lsq"))) == unet_chains(tiny)


def test_a_norm_that_the_time_embedding_scales_is_left_alone():
    model = load_model("tiny")
    model.network |= {"resnet_time_scale_shift": "scale_shift"}
    chains = unet_chains(model.build())
    assert [chain.norm for chain in chains.norms] == ["conv_norm_out"]


def test_blocks_that_resample_themselves_have_no_chain_for_it():
    model = load_model("tiny")
    model.network |= {"upsample_type": "resnet", "downsample_type": "resnet"}
    net = model.build()
    chains = unet_chains(net)
    assert chains.norms and not chains.upsamples
    names = {chain.norm for chain in chains.norms}
    for name, module in net.named_modules():
        if getattr(module, "upsample", None) is not None:
            assert f"{name}.norm1" not in names and f"{name}.norm2" in names
