"""Norms that give codes: the kernel against double precision, and where it is put."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdq_exp.deploy import coders, fuse, integer
from tdq_exp.models.resnet_blocks import unet_chains
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.kernels import unfused
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.rules.lsq import Lsq
from tests.quant.builders import inputs, make_net, randn

HERE = torch.device("cpu")
S, Z, P = 0.02, 90.0, 255
SHAPES = [
    ((3, 64, 16, 16), 16),
    ((1, 48, 5, 7), 12),
    ((2, 6, 1, 1), 3),
    ((5, 32, 3, 21), 1),
    ((2, 33, 8, 8), 33),
]


def made(channels: int, groups: int, affine: bool = True) -> nn.GroupNorm:
    """A group norm with weights of its own."""
    norm = nn.GroupNorm(groups, channels, eps=1e-6, affine=affine).requires_grad_(False)
    if affine:
        norm.weight.copy_(randn(channels, seed=1))
        norm.bias.copy_(randn(channels, seed=2))
    return norm


def exact(x: torch.Tensor, norm: nn.GroupNorm, silu: bool) -> torch.Tensor:
    """In double precision."""
    weight, bias = (None if v is None else v.double() for v in (norm.weight, norm.bias))
    y = F.group_norm(x.double(), norm.num_groups, weight, bias, norm.eps)
    return F.silu(y) if silu else y


def broken(x: torch.Tensor) -> list[torch.Tensor]:
    """Inputs whose norm holds NaN."""
    made = [x.clone() for _ in range(3)]
    for changed, value in zip(made, (torch.nan, torch.inf, -torch.inf), strict=True):
        changed[-1, -1, -1, -1] = value
    return made


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_norm_silu_and_codes_in_one_pass(shape, groups, silu, fused):
    for affine in (True, False):
        norm, x = made(shape[1], groups, affine), randn(*shape) * 3 + 20
        x[:, 0] *= 100  # channels of very different size within a group
        y = exact(x, norm, silu)
        with nullcontext() if fused else unfused():
            found, numbers = kernels.norm_codes(x, norm, silu, S, Z, 0, P)
            normalised = kernels.normalised(x, norm, silu)
            nans = [kernels.norm_codes(changed, norm, silu, S, Z, 0, P)[1] for changed in broken(x)]
        assert numbers and not any(nans)
        assert found.dtype == torch.uint8 and found.is_contiguous(memory_format=torch.channels_last)
        assert float((normalised.double() - y).abs().max()) < 2e-5 * max(1.0, float(y.abs().max()))
        v = y / float(torch.tensor(S)) + Z
        expected = v.round().clamp(0, P)
        border = ((v - v.floor()) - 0.5).abs() < 1e-2
        assert torch.equal(found.double()[~border], expected[~border])
        assert ((found.double() - expected).abs() <= 1).all()
        assert expected.unique().numel() > 3 or x.numel() < 20


def test_silu_is_right_for_every_size_of_input():
    x = torch.linspace(-120, 120, 4001).reshape(1, 1, -1, 1).expand(1, 2, -1, 1)
    wide = nn.GroupNorm(1, 2, eps=1e-6).requires_grad_(False)
    wide.weight.fill_(60.0)  # from -100 to 100 after the norm
    y = exact(x, wide, silu=True)
    assert float(y.max()) > 90
    torch.testing.assert_close(kernels.normalised(x, wide, True).double(), y, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_ranges_hold_zero(fused):
    x = torch.stack([randn(3, 50, 50), randn(3, 50, 50).abs() + 1, -randn(3, 50, 50).abs() - 1])
    with nullcontext() if fused else unfused():
        low, high = kernels.ranges(x)
    assert torch.equal(low, x.flatten(1).amin(1).clamp(max=0))
    assert torch.equal(high, x.flatten(1).amax(1).clamp(min=0))
    assert low[1] == 0 and high[2] == 0


pytestmark = pytest.mark.skipif(
    integer.unavailable(HERE) is not None, reason=str(integer.unavailable(HERE))
)


def test_every_norm_before_an_integer_layer_is_fused_and_no_other():
    net = bake(make_net(Recipe(4, 4, Lsq, Lsq, StaticIntervals())))
    whole = integer.integerize(net, unet_chains(net))
    norms = sum(isinstance(module, nn.GroupNorm) for module in net.modules())
    fused = [module for module in whole.modules() if isinstance(module, fuse.CodedNorm)]
    attentions = [module for module in whole.modules() if isinstance(module, fuse.CodedAttention)]
    assert len(fused) + len(attentions) == norms and attentions
    assert any(isinstance(module, fuse.Passing) for module in whole.modules())
    some = [name for name in integer.candidates(net) if "conv2" in name]
    part = integer.integerize(net, unet_chains(net), some)
    assert sum(isinstance(module, fuse.CodedNorm) for module in part.modules()) == len(some)
    x = inputs(2)[0]
    with torch.no_grad():
        simulated, found = net(x, torch.tensor(9)).sample, part(x, torch.tensor(9)).sample
    assert float((found - simulated).abs().max()) < 0.2 * float(simulated.abs().max())


def test_norms_before_float_layers_stay():
    keep = ("conv", "first", "last")
    net = bake(
        make_net(
            Recipe(4, 4, Lsq, Lsq, StaticIntervals(), plan=Plan(keep_float=keep, attention=False))
        )
    )
    assert not any(
        isinstance(module, fuse.CodedNorm)
        for module in integer.integerize(net, unet_chains(net)).modules()
    )


@torch.no_grad()
def test_codes_are_copied_as_values_would_be():
    net = bake(make_net(Recipe(4, 4, Lsq, Lsq, TemporalIntervals(encoding=16, width=8))))
    whole = integer.integerize(net, unet_chains(net))
    ups = {name for name, module in net.named_modules() if type(module).__name__ == "Upsample2D"}
    assert ups and {n for n, m in whole.named_modules() if isinstance(m, fuse.CodedUpsample)} == ups
    layers = integer.candidates(net)
    for name in ups:
        conv = layers[f"{name}.conv"]
        x = randn(2, conv.w_scale.numel(), 4, 6).contiguous(memory_format=torch.channels_last)
        assert conv.coder is not None
        fused = fuse.CodedUpsample(conv, conv.coder)
        with net.time.at(17):
            plain = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            assert torch.equal(fused(x), plain)
            sized = conv(F.interpolate(x, size=(7, 12), mode="nearest"))
            assert torch.equal(fused(x, (7, 12)), sized)


@torch.no_grad()
def test_a_rounder_gives_what_its_quantizer_gives():
    net = bake(make_net(Recipe(4, 4, Lsq, Lsq, TemporalIntervals(encoding=16, width=8))))
    for quantizer in activation_quantizers(net).values():
        for t in (0, 17, 999):
            with net.time.at(t):
                x = randn(3, 5, 7)
                assert torch.equal(coders.Rounder(quantizer)(x), quantizer(x))
    with (
        net.time.at(torch.tensor([1, 2])),
        pytest.raises(ValueError, match="one time step for the whole batch"),
    ):
        coders.Rounder(quantizer)(x)
