"""Whoever records operations, or replaces memory by fakes, sees the fused kernels as torch operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tdq_exp.quant import bake, kernels, ops
from tdq_exp.quant.kernels import operators
from tests.quant.builders import ONE_LEVEL, inputs, make_net, make_recipe, randn

S, Z = torch.tensor(0.31), torch.tensor(4.0)
EACH = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.1
pytestmark = pytest.mark.skipif(
    not kernels.fused(torch.zeros(2, 2)), reason=f"kernels: {kernels.used(torch.device('cpu'))}"
)


def example(channels_last: bool = False) -> Tensor:
    """`[6, 5, 7, 8]`."""
    x = randn(6, 5, 7, 8, seed=1) * 2
    return x.to(memory_format=torch.channels_last) if channels_last else x


class Quantized(nn.Module):
    """A quantizer's arithmetic by itself."""

    def __init__(self, s: Tensor, z: Tensor | None) -> None:
        super().__init__()
        self.s = nn.Parameter(s.clone())
        self.z = None if z is None else nn.Parameter(z.clone())

    def forward(self, x: Tensor) -> Tensor:
        return ops.fake_quantize_learned(x, self.s, self.z, 0, 15, 0.5)


def test_plain_tensors_go_to_the_kernel_itself(monkeypatch):
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(kernels, "traced_fake_quantize", refuse)
    x = example().requires_grad_()
    ops.fake_quantize_learned(x, nn.Parameter(S), nn.Parameter(Z), 0, 15).sum().backward()
    with torch.no_grad():
        ops.fake_quantize(x, S, Z, 0, 15)


@pytest.mark.parametrize("z", [None, Z, torch.full((6, 1, 1, 1), 3.0)], ids=["none", "one", "each"])
@pytest.mark.parametrize("s", [S, EACH], ids=["static", "per sample"])
def test_the_operator_obeys_torchs_rules(s, z):
    x = example().requires_grad_()
    z = None if z is None else z.clone().requires_grad_()
    for kind in ("learned", "clipped", "noise"):
        noise = torch.rand(x.shape) - 0.5 if kind == "noise" else None
        arguments = (x, s.clone().requires_grad_(), z, 0, 15, 0.5, kind, noise, torch.float32)
        torch.library.opcheck(operators.fake_quantize, arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("z", [None, Z])
def test_the_operator_gives_the_kernels_bits(z, channels_last):
    x, g = example(channels_last), randn(6, 5, 7, 8, seed=3)
    found = []
    for call in (ops._fake_quantize, traced):
        leaves = [v.clone().requires_grad_() for v in (x, EACH) + (() if z is None else (z,))]
        x_hat = call(leaves[0], leaves[1], None if z is None else leaves[2], 0, 15, 0.5, "learned")
        found.append([x_hat, *torch.autograd.grad(x_hat, leaves, g)])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))


def traced(
    x: Tensor, s: Tensor, z: Tensor | None, n: int, p: int, scale: float, kind: str
) -> Tensor:
    """The operator in the place of the kernel."""
    return operators.traced_fake_quantize(x, s, z, (n, p), scale, kind, None, torch.float32)


def test_without_kernels_the_operator_computes_by_single_operations():
    x = example().requires_grad_()
    s, z = EACH.clone().requires_grad_(), Z.clone().requires_grad_()
    found = []
    for call in (ops._fake_quantize, traced):
        with kernels.unfused():
            x_hat = call(x, s, z, 0, 15, 0.5, "clipped")
            found.append([x_hat, *torch.autograd.grad(x_hat, [x, s, z], torch.ones_like(x))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_single_operations_compile_too():
    module, x = Quantized(S, Z), example()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with kernels.unfused():
        (wanted,) = torch.autograd.grad(module(x).square().sum(), module.s)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), module.s)
    torch.testing.assert_close(found, wanted)


def test_fake_tensors_have_shapes_and_no_memory_that_is_read():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(example(True)).requires_grad_()
        s, z = (mode.from_tensor(v).requires_grad_() for v in (EACH, Z))
        x_hat = ops.fake_quantize_learned(x, s, z, 0, 15)
        g_x, g_s, g_z = torch.autograd.grad(x_hat.sum(), [x, s, z])
    assert x_hat.shape == x.shape and x_hat.is_contiguous(memory_format=torch.channels_last)
    assert (g_x.stride(), g_s.shape, g_z.shape) == (x.stride(), s.shape, z.shape)


def test_a_fake_gpu_is_served_by_the_operator():
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(6, 5, 7, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        s = torch.empty(6, 1, 1, 1, device="cuda", requires_grad=True)
        assert kernels.readable(x) is x
        x_hat = ops.fake_quantize_learned(x, s, None, -7, 7)
    assert x_hat.dtype == torch.float32 and x_hat.is_cuda


def test_jit_trace_records_the_operator():
    module, x = Quantized(S, Z), example()
    with torch.no_grad():
        recorded = torch.jit.trace(module, example() * 0.5)
        assert torch.equal(recorded(x), module(x))


def test_make_fx_records_the_operator():
    graph = make_fx(lambda x: ops.fake_quantize(x, EACH, Z, 0, 15))(example() * 0.5)
    assert any("tdq_exp.fake_quantize" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(example()), ops.fake_quantize(example(), EACH, Z, 0, 15))


@pytest.mark.parametrize("interval", ["temporal"])  # and a table of one entry for what is static
def test_export_and_compile_see_a_baked_network(interval):
    net = bake(make_net(make_recipe("lsq", interval), **ONE_LEVEL))
    x, t = inputs()
    t = t[1]
    with torch.no_grad():
        wanted = net(x, t, return_dict=False)[0]
        exported = torch.export.export(net, (x * 0.5, t), {"return_dict": False}).module()
        assert torch.equal(exported(x, t, return_dict=False)[0], wanted)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, t, return_dict=False)[0], wanted)


@pytest.mark.parametrize("interval", ["temporal"])  # its weights have static step sizes
def test_a_training_step_compiles_whole(interval):
    net = make_net(make_recipe("lsq", interval), **ONE_LEVEL).train()
    x, t = inputs()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = []
    for call in (net, compiled, compiled):
        net.zero_grad(set_to_none=True)
        call(x, t, return_dict=False)[0].square().mean().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for a, *others in zip(*found, strict=True):
        for b in others:
            torch.testing.assert_close(a, b)
