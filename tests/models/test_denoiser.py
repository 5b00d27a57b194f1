"""A denoiser: what it computes, what it hands to the network, and when two of them are the same."""

import torch

from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tests.quant.builders import load_model

CONDITIONAL = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "num_class_embeds": 3,
}


def test_a_denoiser_is_the_networks_prediction():
    model = load_model("tiny")
    net = model.build(seed=1).eval()
    x, t = torch.randn(2, *model.sample_shape), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(Denoiser(net, model)(x, t), net(x, t).sample)


def test_the_condition_reaches_the_network_beside_t():
    model = DiffusionModel(CONDITIONAL, Schedule())
    net = model.build(seed=1).eval()
    x, t = torch.randn(2, *model.sample_shape), torch.tensor([3, 700])
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        expected = net(x, t, class_labels=labels).sample
        assert torch.equal(Denoiser(net, model, labels)(x, t), expected)
        assert not torch.equal(Denoiser(net, model, labels.flip(0))(x, t), expected)


def test_denoisers_of_the_same_parts_are_equal():
    model = load_model("tiny")
    net, other = model.build(), model.build()
    labels = torch.tensor([0, 1])
    assert Denoiser(net, model) == Denoiser(net, model)
    assert hash(Denoiser(net, model)) == hash(Denoiser(net, model))
    assert Denoiser(net, model) != Denoiser(other, model)
    assert Denoiser(net, model, labels) == Denoiser(net, model, labels)
    assert Denoiser(net, model, labels) != Denoiser(net, model, labels.clone())
    assert Denoiser(net, model, labels) != Denoiser(net, model)
