"""Values and gradients of fake quantization against slow definitions, plain autograd, and torch's own kernels."""

import pytest
import torch
import torch.nn.functional as F

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.static import PerStep, Static
from tdq_exp.quant.intervals.temporal import GeneratorBank, GeneratorOptions, Temporal
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.kernels import unfused
from tdq_exp.quant.release import ReleaseDetails
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.pact import DorefaWeights, Pact
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint
from tests.oracles import generator, rounding, straight_through
from tests.quant.builders import make_net, make_quantizer, make_recipe, randn

CODES = {
    "affine4": (0, 15),
    "affine8": (0, 255),
    "symmetric4": (-7, 7),
    "affine2": (0, 3),
    "affine16": (0, 65535),
}
TERMS = {
    "learned": rounding.lsq_terms,
    "clipped": rounding.pact_terms,
    "noise": rounding.nipq_terms,
}
AUTOGRAD = {
    "learned": straight_through.lsq,
    "clipped": straight_through.pact,
    "noise": straight_through.nipq,
}
BATCH, SHAPE = 3, (3, 2, 4, 5)

kinds = pytest.mark.parametrize("kind", TERMS)
grids = pytest.mark.parametrize("codes", CODES)
steps = pytest.mark.parametrize("steps", ["one", "per_sample"])
zeros = pytest.mark.parametrize("zeros", ["one", "per_sample"])


@pytest.fixture(params=["eager", "fused"], autouse=True)
def mode(request):
    """Every test of this module holds for both ways of computing."""
    if request.param == "fused":
        assert not isinstance(kernels.library(), str), kernels.library()
        yield
    else:
        with unfused():
            yield


def call(kind, x, s, z, n, p, u):
    """The function under test."""
    if kind == "noise":
        return ops.add_quantization_noise(x, s, z, n, p, u)
    return {"learned": ops.fake_quantize_learned, "clipped": ops.fake_quantize_clipped}[kind](
        x, s, z, n, p
    )


def case(codes, steps, zeros, seed=0):
    """(x, s, z, u, g, n, p): x lies well away from ties and bounds, on both sides of both bounds."""
    n, p = CODES[codes]
    generator = torch.Generator().manual_seed(seed)
    many = (BATCH, 1, 1, 1)
    s = (
        torch.tensor([0.11, 0.07, 0.23]).reshape(many)
        if steps == "per_sample"
        else torch.tensor(0.11)
    )
    share = (
        torch.tensor([0.4, 0.1, 0.8]).reshape(many) if zeros == "per_sample" else torch.tensor(0.4)
    )
    z = (share * p).round() if n == 0 else torch.zeros_like(share)
    width = p - n
    k = (torch.rand(SHAPE, generator=generator) * 1.6 - 0.3) * width + n - z
    fraction = (torch.rand(SHAPE, generator=generator) * 0.3 + 0.1) * torch.randn(
        SHAPE, generator=generator
    ).sign()
    x = s * (k.round() + fraction)
    u = torch.rand(SHAPE, generator=generator) - 0.5
    g = torch.randn(SHAPE, generator=generator)
    return x, s, z, u, g, n, p


def agree(found, expected, scale):
    """Equal but for rounding in single precision of a sum whose terms are as large as `scale`."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 3e-6 * scale


@kinds
@grids
@steps
@zeros
def test_values_and_gradients_equal_the_papers_formulas(kind, codes, steps, zeros):
    x, s, z, u, g, n, p = case(codes, steps, zeros)
    expected = rounding.over_tensor(TERMS[kind], x, s, z, n, p, g, u)
    x, s, z = (v.clone().requires_grad_() for v in (x, s, z))
    x_hat = call(kind, x, s, z, n, p, u)
    x_hat.backward(g)
    most = float(s.detach().max()) * (p - n)
    agree(x_hat.detach(), expected[0], most)
    assert torch.equal(x.grad.double(), expected[1])
    agree(s.grad, expected[2], (p - n) * float(g.abs().sum()))
    agree(z.grad, expected[3], float(g.abs().sum()))


@kinds
@grids
@steps
@zeros
def test_values_and_gradients_equal_plain_autograd(kind, codes, steps, zeros):
    x, s, z, u, g, n, p = case(codes, steps, zeros, seed=1)
    x2, s2, z2 = (v.double().requires_grad_() for v in (x, s, z))
    slow = AUTOGRAD[kind](x2, s2, z2, n, p, *([u.double()] if kind == "noise" else []))
    slow.backward(g.double())
    x, s, z = (v.clone().requires_grad_() for v in (x, s, z))
    fast = call(kind, x, s, z, n, p, u)
    fast.backward(g)
    agree(fast.detach(), slow.detach(), float(s.max()) * (p - n))
    assert torch.equal(x.grad.double(), x2.grad)
    agree(s.grad, s2.grad, (p - n) * float(g.abs().sum()))
    agree(z.grad, z2.grad, float(g.abs().sum()))


@kinds
@pytest.mark.parametrize(
    ("n", "p", "z", "learned_z"),
    [
        (0, 15, 6, True),
        (0, 15, 0, True),
        (0, 15, 15, False),
        (-7, 7, 0, False),
        (-7, 7, 3, True),
        (-7, 7, 3, False),
    ],
)
def test_bounds_and_ties_are_as_defined(kind, n, p, z, learned_z):
    # With s = 1/4 everything below is exact in single precision.
    x = 0.25 * torch.arange(n - z - 2, p - z + 2.25, 0.25)[None]
    s, u, g = torch.tensor(0.25), torch.full_like(x, 0.375), torch.ones_like(x)
    expected = rounding.over_tensor(TERMS[kind], x, s, torch.tensor(float(z)), n, p, g, u)
    x, s = x.requires_grad_(), s.requires_grad_()
    zero = torch.tensor(float(z), requires_grad=learned_z)
    x_hat = call(kind, x, s, zero, n, p, u)
    x_hat.backward(g)
    assert x_hat.tolist() == expected[0].tolist()
    assert x.grad.tolist() == expected[1].tolist()
    assert float(s.grad) == pytest.approx(float(expected[2]), abs=1e-4)
    if learned_z:
        assert float(zero.grad) == pytest.approx(float(expected[3]), abs=1e-5)


@grids
@steps
@zeros
def test_codes_and_inference_equal_the_definition(codes, steps, zeros):
    x, s, z, _, g, n, p = case(codes, steps, zeros, seed=2)
    expected = rounding.over_tensor(rounding.lsq_terms, x, s, z, n, p, g)[0]
    x_bar = ops.to_codes(x, s, z, n, p)
    assert torch.equal(x_bar, x_bar.round())
    assert float(x_bar.min()) == n and float(x_bar.max()) == p
    agree(s * (x_bar - z), expected, float(s.max()) * (p - n))
    assert torch.equal(ops.fake_quantize(x, s, z, n, p), s * (x_bar - z))
    assert torch.equal(ops.fake_quantize(x, s, z, n, p), ops.fake_quantize_learned(x, s, z, n, p))
    assert torch.equal(ops.fake_quantize(x, s, z, n, p), ops.fake_quantize_clipped(x, s, z, n, p))


def test_nothing_is_changed_in_place():
    x, s, z, u, _, n, p = case("affine4", "per_sample", "one")
    before = [v.clone() for v in (x, s, z, u)]
    ops.to_codes(x, s, z, n, p)
    ops.fake_quantize(x, s, z, n, p)
    for kind in TERMS:
        call(kind, x, s, z, n, p, u)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, s, z, u), strict=True))


@pytest.mark.parametrize("codes", ["affine4", "affine8", "symmetric4", "affine2", "affine16"])
def test_torchs_own_kernels_agree(codes):
    x, s, z, _, g, n, p = case(codes, "one", "one", seed=3)
    v = x / s + z
    at_a_bound = ((v - n).abs() < 0.51) | ((v - p).abs() < 0.51)
    g = g.masked_fill(
        at_a_bound, 0.0
    )  # there torch goes by the rounded value, LSQ by the value itself
    plain = torch.fake_quantize_per_tensor_affine(x, float(s), int(z), n, p)
    x1, s1, z1 = (
        v.clone().reshape(shape).requires_grad_() for v, shape in ((x, SHAPE), (s, 1), (z, 1))
    )
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x1, s1, z1, n, p, 0.5)
    theirs.backward(g)
    x2, s2, z2 = (v.clone().requires_grad_() for v in (x, s, z))
    ours = ops.fake_quantize_learned(x2, s2, z2, n, p, 0.5)
    ours.backward(g)
    most = float(s) * (p - n)
    agree(ours.detach(), plain.double(), most)
    agree(ours.detach(), theirs.detach().double(), most)
    assert torch.equal(x2.grad, x1.grad)
    scale = float(g.abs().sum())
    agree(s2.grad, s1.grad.double().reshape(()), 4 * (p - n) * scale)
    agree(
        z2.grad, 2 * z1.grad.double().reshape(()), 4 * scale
    )  # torch scales the zero point's gradient too


def test_gradient_of_the_step_keeps_its_digits_over_a_large_tensor():
    # A small rounding error beside a large value, added up a million times.
    x = 3 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).reshape(4, -1)
    s, z, n, p = torch.tensor(12 / 255), torch.tensor(128.0), 0, 255
    v = x.double() / s.double()
    g = 1 + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    inside = (v > n - z) & (v < p - z)
    expected = (
        g.double() * torch.where(inside, v.round() - v, v.round().clamp(n - 128.0, p - 128.0))
    ).sum()
    s.requires_grad_()
    ops.fake_quantize_learned(x, s, z, n, p).backward(g)
    assert float(s.grad) == pytest.approx(float(expected), rel=2e-2)


def test_an_incoming_gradient_may_have_any_memory_layout():
    x, s, z, _, g, n, p = case("affine4", "one", "one")
    ga = g.contiguous(memory_format=torch.channels_last)
    grads = []
    for x_in, g_in in (
        (x, g),
        (x.contiguous(memory_format=torch.channels_last), ga),
        (x, torch.ones(()).expand(SHAPE)),
    ):
        leaf, step = x_in.clone().requires_grad_(), s.clone().requires_grad_()
        ops.fake_quantize_learned(leaf, step, z, n, p).backward(g_in)
        grads.append((leaf.grad.contiguous(), step.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-4)
    expected = rounding.over_tensor(rounding.lsq_terms, x, s, z, n, p, torch.ones(SHAPE))
    assert torch.equal(grads[2][0].double(), expected[1])
    assert float(grads[2][1]) == pytest.approx(float(expected[2]), rel=1e-4)


# --- LSQ's gradient scale


def gradient_of_step(quantizer, x, time, t, g):
    """The gradient of the raw parameter for one batch."""
    quantizer.zero_grad()
    with time.at(t):
        quantizer(x).backward(g)
    return quantizer.interval.rho.grad.clone()


@pytest.mark.parametrize("interval", ["static", "per_step"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_two_half_batches_add_up_to_a_whole_one(interval, symmetric):
    # Two processes share a batch like this. The release's activations are symmetric, as weights are, but not weights.
    recipe = make_recipe("lsq", interval, habits=ReleaseDetails(symmetric_activations=symmetric))
    net = make_net(recipe, calibrated=False).train()
    quantizer = net.get_submodule("mid_block.attentions.0.processor.q")
    assert quantizer.grid.symmetric == symmetric
    quantizer.start(0.2, 6)
    x, g, t = randn(8, 3, 4, 4), randn(8, 3, 4, 4, seed=1), torch.arange(0, 1000, 125)
    whole = gradient_of_step(quantizer, x, net.time, t, g)
    halves = [
        gradient_of_step(quantizer, x[part], net.time, t[part], g[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert torch.allclose(whole, halves[0] + halves[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 6), (8, 2, 5, 3)])
def test_gradient_scale_counts_the_elements_of_a_sample(shape):
    time = TimeContext(1000)
    grid = Grid(4, symmetric=False)
    x, g = randn(*shape), randn(*shape, seed=1)
    found = []
    for scaled in (True, False):
        quantizer = Lsq(grid, Static(), ZeroPoint(grid), gradient_scale=scaled).train()
        quantizer.start(0.2, 6)
        found.append(float(gradient_of_step(quantizer, x, time, 0, g)))
    elements = x.numel() // len(x)
    assert found[0] / found[1] == pytest.approx((elements * grid.p) ** -0.5, rel=1e-5)


def test_gradient_scale_of_weights_counts_all_of_them():
    grid = Grid(4, symmetric=True)
    w, g = randn(6, 5, 3, 3), randn(6, 5, 3, 3, seed=1)
    found = []
    for scaled in (True, False):
        quantizer = Lsq(grid, Static(), gradient_scale=scaled).train()
        quantizer.fixed = True
        quantizer.start(0.3, 0)
        found.append(float(gradient_of_step(quantizer, w, TimeContext(1), 0, g)))
    assert found[0] / found[1] == pytest.approx((w.numel() * grid.p) ** -0.5, rel=1e-5)


def test_pact_and_nipq_do_not_scale():
    for rule, terms in (("pact", rounding.pact_terms), ("nipq", rounding.lsq_terms)):
        quantizer, _, _ = make_quantizer(rule, 4, "affine", "static")
        x, g = 0.6 * randn(3, 10), randn(3, 10, seed=1)
        s, z = (v.detach() for v in quantizer.parameters_at(x))
        expected = rounding.over_tensor(terms, x, s, z, 0, 15, g)[2]
        quantizer(x).backward(g)
        by_rho = float(expected) * float(torch.sigmoid(quantizer.interval.rho))
        assert float(quantizer.interval.rho.grad) == pytest.approx(by_rho, rel=1e-4)


# --- Through softplus and generator to the parameters


@pytest.mark.parametrize("rule", ["lsq", "pact", "nipq"])
@pytest.mark.parametrize("grid", ["affine", "lower_bound"])
def test_gradients_of_generators_equal_those_of_one_by_one_generators(rule, grid):
    time = TimeContext(1000)
    names, layers, codes = ["a", "b.c", "d"], 3, Grid(4, symmetric=False)
    torch.manual_seed(0)
    bank = GeneratorBank(names, time, GeneratorOptions(encoding=16, width=6, layers=layers))
    zero = {"affine": ZeroPoint, "lower_bound": LowerBound}[grid]
    cls = type(make_quantizer(rule, 4, "affine", "static")[0])
    quantizers = [cls(codes, Temporal(bank, row), zero(codes)).train() for row in range(3)]
    x, g, t = randn(4, 3, 7), randn(4, 3, 7, seed=1), torch.tensor([3, 900, 3, 411])
    for row, quantizer in enumerate(quantizers):
        quantizer.start(0.1 * (row + 1), 4 + row)
        if rule == "nipq":
            quantizer.noisy = False
    with time.at(t):
        torch.stack([quantizer(x) * g for quantizer in quantizers]).sum().backward()

    method = AUTOGRAD["clipped" if rule == "pact" else "learned"]
    scale = (21 * codes.p) ** -0.5 if rule == "lsq" else 1.0
    for row, (name, quantizer) in enumerate(zip(names, quantizers, strict=True)):
        f = generator.network(bank.state_dict(), name, layers)
        raw = [p.detach().double().requires_grad_() for p in quantizer.zero_point.parameters()]
        total = torch.zeros((), dtype=torch.float64)
        for b in range(4):  # one sample and one time step at a time
            s = generator.step_size(f, int(t[b]))
            # The scale is for all that reaches the step: through the rule, and through a zero point that follows it.
            s = (s * scale) + (s - s * scale).detach()
            if grid == "affine":
                z = straight_through.rounded(raw[0] * codes.p)
            else:
                z = straight_through.rounded(-raw[0] / s)
            total = total + (method(x[b].double(), s, z, codes.n, codes.p) * g[b].double()).sum()
        total.backward()
        for layer, linear in enumerate(part for part in f if isinstance(part, torch.nn.Linear)):
            weight, bias = bank.weights[layer].grad[row], bank.biases[layer].grad[row]
            assert torch.allclose(weight.double(), linear.weight.grad, rtol=1e-3, atol=1e-5)
            assert torch.allclose(bias.double(), linear.bias.grad, rtol=1e-3, atol=1e-5)
            assert float(bias.abs().max()) > 1e-4
        for mine, slow in zip(quantizer.zero_point.parameters(), raw, strict=True):
            assert float(mine.grad) == pytest.approx(float(slow.grad), rel=1e-3, abs=1e-5)


def test_a_static_step_learns_through_softplus():
    interval = Static()
    interval.start(0.3)
    assert float(interval.step_size().detach()) == pytest.approx(0.3, rel=1e-6)
    interval.step_size().backward()
    assert float(interval.rho.grad) == pytest.approx(
        1 - torch.exp(torch.tensor(-0.3)).item(), rel=1e-5
    )


def test_a_raw_static_step_is_the_parameter_itself():
    interval = Static(raw=True)
    interval.start(0.3)
    interval.step_size().backward()
    assert (
        float(interval.rho.detach()) == float(interval.step_size().detach()) == pytest.approx(0.3)
    )
    assert float(interval.rho.grad) == 1.0


def test_each_group_of_time_steps_learns_from_its_own_samples():
    time = TimeContext(1000)
    interval = PerStep(4, time)
    interval.start(0.3)
    with time.at(torch.tensor([0, 249, 250, 999])):
        interval.step_size().backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    slope = torch.sigmoid(interval.rho.detach())
    assert torch.allclose(interval.rho.grad, torch.tensor([3.0, 4.0, 0.0, 8.0]) * slope)


# --- Rounding straight through, PACT's penalty, DoReFa


def test_rounding_straight_through_gives_integers_and_passes_gradients():
    x = torch.tensor([0.5, 1.5, -0.4, 65534.7, 3e6 + 0.25], requires_grad=True)
    y = ops.round_straight_through(x)
    y.backward(torch.arange(5.0))
    assert y.tolist() == [0.0, 2.0, 0.0, 65535.0, 3000000.0]
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("interval", ["static", "per_step", "temporal"])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_pacts_penalty_is_the_batchs_mean_of_alpha_squared(interval, grid):
    quantizer, time, bank = make_quantizer("pact", 4, grid, interval, decay=0.01)
    assert isinstance(quantizer, Pact)
    t = torch.tensor([1, 500, 999])
    with time.at(t):
        s = quantizer.interval.step_size().detach().double().expand(3)
        penalty = quantizer.penalty()
        penalty.backward()
    half_range = {"affine": 7.5, "symmetric": 7.0}[grid]
    expected = sum(0.01 * (float(s_b) * half_range) ** 2 for s_b in s) / 3
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    learned = list((quantizer.interval if bank is None else bank).parameters())
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in learned)


def test_dorefas_literal_form():
    grid = Grid(3, symmetric=True)
    quantizer = DorefaWeights(grid, Static())
    w = randn(4, 5).requires_grad_()
    w_hat = quantizer(w)
    bounded = [torch.tanh(v).item() for v in w.detach().reshape(-1)]
    top = max(abs(v) for v in bounded)
    expected = [2 * round((v / (2 * top) + 0.5) * 7) / 7 - 1 for v in bounded]
    assert w_hat.detach().reshape(-1).tolist() == pytest.approx(expected, abs=1e-6)
    w_hat.sum().backward()
    assert w.grad.reshape(-1).tolist() == pytest.approx(
        [(1 - v * v) / top for v in bounded], rel=1e-4
    )


def test_softplus_and_its_inverse_over_many_sizes():
    for s in (1e-8, 1e-5, 0.003, 0.5, 7.0, 40.0, 3000.0):
        interval = Static()
        interval.start(s)
        assert float(F.softplus(interval.rho.detach())) == pytest.approx(s, rel=3e-6)
