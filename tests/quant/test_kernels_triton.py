"""The GPU's kernels against single tensor operations: under Triton's interpreter, and on a GPU.

Each law is written once for both. Without a GPU `tests/test_other_kernels.py` starts Python anew
with TRITON_INTERPRET=1, which triton reads when it is imported, and runs the laws there on CPU
tensors in float32: those of this file and of `test_kernels_integer`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdq_exp.quant import bake, kernels, ops
from tests.quant.builders import inputs, make_net, make_recipe
from tests.quant.devices import INTERPRETED, devices

KINDS = ("learned", "clipped", "noise")
N, P, SCALE = 0, 15, 0.7

# The interpreter takes some milliseconds for every row and block: fewer of them, of every kind.
BATCH, BLOCKS, VECTORS, REPEATS = (3, 4, 8, 2) if INTERPRETED else (6, 8, 300, 5)
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "images": ((BATCH, 5, 7, 8), "contiguous"),
    "channels last": ((BATCH, 5, 7, 8), "channels last"),
    "transposed": ((BATCH, 56, 5), "transposed"),
    "one row": ((1, 3, 5, 5), "contiguous"),
    "one number": ((1,), "contiguous"),
    "exactly one block": ((2, 1024), "contiguous"),
    "a block and one number": ((2, 1025), "contiguous"),
    "several blocks, the last nearly empty": ((3, 1024 * BLOCKS + 1), "contiguous"),
    "vectors": ((VECTORS, 3), "contiguous"),
}


def triton_kernels():
    """The module, imported only where it is used."""
    from tdq_exp.quant.kernels import triton

    return triton


def types(device: str) -> list[torch.dtype]:
    """What the kernels read there: the interpreter has no bfloat16."""
    return [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int, device: str) -> Tensor:
    """Standard normal numbers, the same on each device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def sample(name: str, device: str, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A tensor of a shape and layout of `SHAPES`, on both sides of the range."""
    shape, layout = SHAPES[name]
    if layout == "transposed":
        batch, rows, columns = shape
        return (randn(batch, columns, rows, seed=seed, device=device) * 3).to(dtype).transpose(1, 2)
    x = (randn(*shape, seed=seed, device=device) * 3).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels last" else x


def parameters(x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """(s, z): one for all rows of x or one for each, and no z."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(x), *[1] * (x.dim() - 1))
    each = (torch.rand(shape, generator=generator) * 0.4 + 0.1).to(x.device)
    zeros = torch.randint(N, P, shape, generator=generator).float().to(x.device)
    one, four = torch.tensor(0.31, device=x.device), torch.tensor(4.0, device=x.device)
    return [(s, z) for s in (one, each) for z in (None, four, zeros)]


def noise_for(x: Tensor, kind: str) -> Tensor | None:
    """u of NIPQ."""
    if kind != "noise":
        return None
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) - 0.5
    return kernels.like(x, u.to(x.device))


def by_single_operations(
    x: Tensor, s: Tensor, z: Tensor | None, kind: str, noise: Tensor | None, g: Tensor
) -> list[Tensor]:
    """[x_hat, g_x, g_s] and, with z, g_z, in float32."""
    leaves = [v.detach().float().requires_grad_() for v in (x, s) + (() if z is None else (z,))]
    zero = None if z is None else leaves[2]
    with kernels.unfused():
        x_hat = ops._fake_quantize(leaves[0], leaves[1], zero, N, P, SCALE, kind, noise)
        return [x_hat.detach(), *torch.autograd.grad(x_hat, leaves, g.float())]


@devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_single_operations(name, kind, device):
    triton = triton_kernels()

    # The interpreter takes a tenth of a second for each: all pairs of the first two shapes, of any
    # other one s and one for each row, with one of the three z in turn.
    place = list(SHAPES).index(name)
    first, step = (0, 1) if device != "cpu" or place < 2 else (place % 3, 3)
    for dtype in types(device):
        x = kernels.dense(sample(name, device, dtype))
        g = kernels.like(x, sample(name, device, dtype, seed=3))
        u = noise_for(x, kind)
        pairs = parameters(x)[first::step]
        assert len(pairs) == 6 // step
        for s, z in pairs:
            x_hat = triton.forward(x, s, z, N, P, u)
            found = triton.backward(g, x, s, z, N, P, SCALE, kind, u)
            wanted = by_single_operations(x, s, z, kind, u, g)

            assert torch.equal(x_hat, wanted[0])
            assert torch.equal(found[0], wanted[1].to(dtype)) and found[0].stride() == x.stride()
            for a, b in zip(found[1:], wanted[2:], strict=False):
                assert a is not None and a.shape == b.shape
                torch.testing.assert_close(
                    a, b, rtol=2e-5, atol=1e-5 * float(g.float().abs().sum())
                )


@devices
@pytest.mark.parametrize("z", [None, "one", "each"])
def test_s_and_z_are_read_from_tables(z, device):
    triton = triton_kernels()
    x, t = sample("a block and one number", device, torch.float32), torch.tensor(3, device=device)
    s = torch.rand(10, generator=torch.Generator().manual_seed(5)).to(device) + 0.1
    zeros = {
        None: None,
        "one": torch.tensor([4.0], device=device),
        "each": torch.arange(10.0, device=device),
    }[z]
    entry = None if zeros is None else zeros[3] if len(zeros) > 1 else zeros[0]
    assert torch.equal(
        triton.forward_at(x, s, zeros, t, N, P), triton.forward(x, s[3], entry, N, P)
    )

    # Nothing on a GPU can refuse a time step: one that they do not hold gives no number.
    for outside in (-1, 10):
        t = torch.tensor(outside, device=device)
        assert bool(triton.forward_at(x, s, zeros, t, N, P).isnan().all())


@devices
def test_one_step_size_is_that_of_every_time_step(device):
    triton = triton_kernels()
    x, t = sample("a block and one number", device, torch.float32), torch.tensor(3, device=device)
    s = torch.tensor([0.3], device=device)
    assert torch.equal(triton.forward_at(x, s, None, t, N, P), triton.forward(x, s, None, N, P))


@devices
def test_rounding_is_half_to_even_and_division_exact(device):
    triton = triton_kernels()
    halves = torch.arange(-40, 40, device=device) / 2
    one = torch.tensor(1.0, device=device)
    assert torch.equal(triton.forward(halves, one, None, -127, 127), halves.round())

    # 65,535 codes of a step that 1 / s would round: each x is a multiple of s, give or take a bit.
    s = torch.tensor(0.1, device=device) / 3
    x = torch.arange(-32767.0, 32768.0, device=device) * s + s / 2
    wanted = (x / s).clamp(-32767, 32767).round() * s
    assert torch.equal(triton.forward(x, s, None, -32767, 32767), wanted)


@devices
def test_a_nan_stays_one_and_infinities_are_clipped(device):
    triton = triton_kernels()
    x = torch.tensor([[0.3, float("nan"), 1e30, -float("inf")]], device=device)
    s, z = torch.tensor(0.5, device=device), torch.tensor(2.0, device=device)
    found = triton.forward(x, s, z, 0, 15).cpu()
    assert found[0, 1].isnan() and found[0, [0, 2, 3]].tolist() == [0.5, 6.5, -1.0]


@devices
def test_a_repeated_run_gives_the_same_bits(device):
    triton = triton_kernels()
    x = sample("several blocks, the last nearly empty", device, torch.float32)
    g = sample("several blocks, the last nearly empty", device, torch.float32, seed=3)
    for s, z in parameters(x):
        runs = [triton.backward(g, x, s, z, N, P, SCALE, "learned", None) for _ in range(REPEATS)]
        for run in runs[1:]:
            for a, b in zip(runs[0], run, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


@devices
def test_the_gradient_of_rounding_to_the_grid(device):
    triton = triton_kernels()
    x = torch.tensor([-3.0, -3.0, 2.4, 2.4, 20.0, 20.0], device=device)
    g = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], device=device)
    assert triton.round_backward(x, g, 0, 15).tolist() == [0, -1, 1, -1, 1, 0]
    scalar = torch.tensor(20.0, device=device)
    assert triton.round_backward(scalar, -scalar, -torch.inf, 15).shape == ()


# What only a GPU has: bfloat16, streams and graphs. The networks are tiny.


@pytest.mark.gpu
def test_a_gpu_is_served_by_triton():
    x = torch.zeros(2, 2, device="cuda")
    assert kernels.used(x.device) == "fused: triton" and kernels.fused(x)
    assert kernels.kernels_for(x) is triton_kernels()


def sums_in_double(
    x: Tensor, s: Tensor, z: Tensor | None, kind: str, noise: Tensor | None, g: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(sum, sum of magnitudes) of g_s and, with z, of g_z: terms in float32, sums in float64, for each sample."""
    low, high = (N, P) if z is None else (N - z, P - z)
    v = x / s
    inside = (v > low) & (v < high)
    bounded = torch.minimum(torch.maximum(v, v * 0 + low), v * 0 + high)
    error = {"learned": bounded.round() - v, "clipped": torch.zeros_like(v), "noise": noise}[kind]
    terms = [SCALE * g.double() * torch.where(inside, error, bounded)]
    terms += [] if z is None else [torch.where(inside, 0.0, -g.double() * s)]
    return [(term.flatten(1).sum(1), term.abs().flatten(1).sum(1)) for term in terms]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_many_numbers_in_many_blocks(kind):
    triton = triton_kernels()
    x = randn(64, 128, 32, 32, seed=6, device="cuda")
    g = randn(64, 128, 32, 32, seed=7, device="cuda")
    u = noise_for(x, kind)
    for s, z in parameters(x):
        first = triton.backward(g, x, s, z, N, P, SCALE, kind, u)
        again = triton.backward(g, x, s, z, N, P, SCALE, kind, u)
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))

        wanted = by_single_operations(x, s, z, kind, u, g)
        assert torch.equal(triton.forward(x, s, z, N, P, u), wanted[0])
        assert torch.equal(first[0], wanted[1])
        for found, (total, size) in zip(
            first[1:], sums_in_double(x, s, z, kind, u, g), strict=False
        ):
            if found.numel() == 1:
                total, size = total.sum(), size.sum()
            apart = (found.double().reshape(total.shape) - total).abs()
            assert bool((apart <= 3e-7 * size + 1e-6 * total.abs()).all()), (
                kind,
                float(apart.max()),
            )


@pytest.mark.gpu
def test_autocast_gets_its_own_type_with_the_same_bits():
    x = randn(4, 8, 8, 8, seed=1, device="cuda")
    s = torch.tensor(0.3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        fused = ops.fake_quantize_learned(x, s, None, -7, 7)
        half = ops.fake_quantize_learned(kernels.readable(x.bfloat16()), s, None, -7, 7)
    with kernels.unfused():
        single = ops.fake_quantize_learned(x, s, None, -7, 7)
        single_half = ops.fake_quantize_learned(x.bfloat16().float(), s, None, -7, 7)
    assert fused.dtype == half.dtype == torch.bfloat16
    assert torch.equal(fused, single.bfloat16()) and torch.equal(half, single_half.bfloat16())


def _gradients(net: torch.nn.Module, x: Tensor, t: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    net(x, t, return_dict=False)[0].square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["lsq", "pact"])
@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_a_training_step_is_the_same_with_and_without_kernels(rule, interval):
    net = make_net(make_recipe(rule, interval)).cuda().train()
    x, t = (v.cuda() for v in inputs(8))
    fused = _gradients(net, x, t)
    with kernels.unfused():
        single = _gradients(net, x, t)
    for a, b in zip(fused, single, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_nothing_waits_for_the_gpu_in_a_training_step(interval):
    net = make_net(make_recipe("lsq", interval)).cuda().train()
    x, t = (v.cuda() for v in inputs(8))
    _gradients(net, x, t)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(net, x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_a_compiled_network_gives_the_same_image(interval):
    net = bake(make_net(make_recipe("lsq", interval))).cuda()
    x, t = inputs(8)
    x, t = x.cuda(), t[1].cuda()
    with torch.no_grad():
        wanted = net(x, t, return_dict=False)[0]
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, t, return_dict=False)[0], wanted)


@pytest.mark.gpu
def test_a_compiled_training_step_has_the_same_gradients():
    net = make_net(make_recipe("lsq", "static")).cuda().train()
    x, t = (v.cuda() for v in inputs(8))
    wanted = _gradients(net, x, t)
    found = _gradients(torch.compile(net, backend="aot_eager", fullgraph=True), x, t)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_bits_and_follows_t():
    net = bake(make_net(make_recipe("lsq", "temporal"))).cuda()
    x, ts = inputs(8)
    x, t = x.cuda(), torch.zeros((), dtype=torch.long, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(x, t, return_dict=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x, t, return_dict=False)[0]
        for at in ts.tolist():
            t.fill_(at)
            graph.replay()
            assert torch.equal(y, net(x, torch.tensor(at, device="cuda"), return_dict=False)[0])
