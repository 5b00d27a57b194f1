"""AdaRound against the paper's formulas: soft rounding, its term, where both start and where they end."""

import pytest
import torch

from tdq_exp.quant.grid import Grid
from tdq_exp.quant.ops import affine_range
from tdq_exp.quant.rules.adaround import AdaRound, beta_at
from tests.oracles import adaround as oracle
from tests.quant.builders import randn

BITS = (2, 4, 8)


def made(bits=4, grid="affine", beyond=1.0, shape=(5, 3, 2, 2), seed=0):
    """(w, AdaRound of it) by output channel; `beyond` > 1 leaves some weights outside of the grid."""
    w = randn(*shape, seed=seed)
    codes = Grid(bits, symmetric=grid == "symmetric")
    if grid == "symmetric":
        s = w.flatten(1).abs().amax(1) / codes.p / beyond
        z = torch.zeros_like(s)
    else:
        s, z = affine_range(*(w / beyond).flatten(1).aminmax(dim=1), codes.n, codes.p)
    s, z = (value.reshape(-1, 1, 1, 1) for value in (s, z))
    return w, AdaRound(w, s, z, codes.n, codes.p)


def numbers(w, rounding):
    """(w, s, z, V) of every weight, as plain numbers."""
    s, z = (value.expand_as(w).flatten().tolist() for value in (rounding.s, rounding.z))
    return list(
        zip(
            w.flatten().tolist(),
            s,
            [int(k) for k in z],
            rounding.V.detach().flatten().tolist(),
            strict=True,
        )
    )


def stirred(rounding, seed=1):
    """With V anywhere, some of it where h is clipped."""
    with torch.no_grad():
        rounding.V.copy_(3 * randn(*rounding.V.shape, seed=seed))
    return rounding


every_grid = pytest.mark.parametrize("grid", ["affine", "symmetric"])


@every_grid
@pytest.mark.parametrize("bits", BITS)
def test_soft_rounding_is_the_papers_one_number_at_a_time(bits, grid):
    w, rounding = made(bits, grid, beyond=1.5)
    stirred(rounding)
    w_hat = rounding().detach()
    expected = [
        oracle.soft_weight(*row[:3], rounding.n, rounding.p, row[3]) for row in numbers(w, rounding)
    ]
    assert torch.allclose(
        w_hat.flatten().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )
    clipped = (rounding.floor + rounding.rounding() + rounding.z).detach()
    assert (
        (clipped < rounding.n) | (clipped > rounding.p)
    ).any()  # the data would show a forgotten clip


@pytest.mark.parametrize("beta", [20.0, 5.5, 2.0])
def test_the_rounding_term_is_the_papers_one_number_at_a_time(beta):
    _, rounding = made()
    stirred(rounding)
    expected = oracle.term(rounding.V.detach().flatten().tolist(), beta)
    assert float(rounding.regularizer(beta).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_term_is_largest_at_one_half_and_nothing_where_h_is_decided():
    _, rounding = made()
    with torch.no_grad():
        rounding.V.zero_()
    assert float(rounding.regularizer(8.0).detach()) == pytest.approx(rounding.V.numel())
    with torch.no_grad():
        rounding.V.copy_(
            torch.where(rounding.floor.remainder(2) == 0, 9.0, -9.0).expand_as(rounding.V)
        )
    assert float(rounding.regularizer(8.0).detach()) == 0.0


@every_grid
@pytest.mark.parametrize("beta", [20.0, 2.0])
def test_gradients_are_those_of_plain_autograd_in_double_precision(beta, grid):
    w, rounding = made(4, grid, beyond=1.2)
    stirred(rounding)
    pull = randn(*w.shape, seed=3)
    ((rounding() * pull).sum() + 0.3 * rounding.regularizer(beta)).backward()
    v = rounding.V.detach().double().requires_grad_()
    s, z = rounding.s.double(), rounding.z.double()
    # floor is of the single-precision quotient: it is data, not a formula under test
    w_on_floor = rounding.floor.double() * s + 0.5 * s
    soft = oracle.soft_weights(w_on_floor, s, z, rounding.n, rounding.p, v)
    ((soft * pull.double()).sum() + 0.3 * oracle.terms(v, beta)).backward()
    assert torch.allclose(rounding.V.grad.double(), v.grad, rtol=1e-4, atol=1e-6)
    assert (v.grad == 0).any()  # some h are clipped: there nothing may pass
    assert (v.grad != 0).sum() > v.numel() // 2


@every_grid
@pytest.mark.parametrize("bits", BITS)
def test_it_starts_at_the_weight_itself(bits, grid):
    w, rounding = made(bits, grid, beyond=1.3)
    v = w / rounding.s
    inside = (v >= rounding.n - rounding.z) & (v <= rounding.p - rounding.z)
    assert not inside.all() and inside.sum() > inside.numel() // 2
    w_hat, s = rounding(w).detach(), rounding.s.expand_as(w)
    assert ((w_hat - w).abs() <= 1e-5 * s + 1e-6 * w.abs())[inside].all()
    bounds = rounding.s * torch.where(v > 0, rounding.p - rounding.z, rounding.n - rounding.z)
    assert torch.equal(w_hat[~inside], bounds.expand_as(w)[~inside])


@every_grid
@pytest.mark.parametrize("bits", BITS)
def test_untrained_it_rounds_to_nearest(bits, grid):
    w, rounding = made(bits, grid)
    nearest = ((w / rounding.s).round() + rounding.z).clamp(rounding.n, rounding.p)
    tie = (
        (w / rounding.s).frac().abs() - 0.5
    ).abs() < 1e-4  # 2 bits: a channel's ends may lie half way
    assert torch.equal(rounding.codes()[~tie], nearest[~tie])


@every_grid
@pytest.mark.parametrize("bits", BITS)
def test_hard_codes_lie_within_one_of_the_floor(bits, grid):
    w, rounding = made(bits, grid, beyond=1.2)
    stirred(rounding)
    codes = rounding.codes()
    expected = [
        oracle.hard_code(*row[:3], rounding.n, rounding.p, row[3]) for row in numbers(w, rounding)
    ]
    assert codes.flatten().tolist() == expected
    assert codes.min() >= rounding.n and codes.max() <= rounding.p
    floor = rounding.floor + rounding.z
    up = (codes - floor)[(floor >= rounding.n) & (floor < rounding.p)]
    assert set(up.tolist()) == {0.0, 1.0}  # both happen


def test_hard_and_soft_agree_once_h_is_decided():
    _, rounding = made(3)
    with torch.no_grad():
        rounding.V.copy_(torch.where(rounding.V > 0, 6.0, -6.0))
    assert torch.equal(rounding().detach(), (rounding.codes() - rounding.z) * rounding.s)


def test_only_v_is_trained():
    _, rounding = made()
    assert [name for name, _ in rounding.named_parameters()] == ["V"]


@pytest.mark.parametrize(
    "updates, warmup", [(100, 0.2), (100, 0.0), (7, 0.3), (1, 0.0), (20000, 0.2)]
)
def test_beta_is_the_written_formula(updates, warmup):
    for update in range(0, updates, max(1, updates // 50)):
        expected = oracle.beta(update, updates, 20.0, 2.0, warmup)
        found = beta_at(update, updates, 20.0, 2.0, warmup)
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_beta_is_off_during_warm_up_and_falls_from_its_start_to_its_end():
    values = [beta_at(update, 1000, 20.0, 2.0, 0.2) for update in range(1000)]
    assert values[:200] == [None] * 200
    rest = values[200:]
    assert rest[0] == 20.0
    assert all(earlier > later for earlier, later in zip(rest, rest[1:], strict=False))
    assert 2.0 < rest[-1] < 2.001
    assert rest[400] == pytest.approx(11.0)  # half way


def test_beta_falls_linearly_on_request_as_in_brecq():
    values = [beta_at(update, 1000, 20.0, 2.0, 0.2, "linear") for update in range(1000)]
    assert values[:200] == [None] * 200
    steps = [a - b for a, b in zip(values[200:], values[201:], strict=False)]
    assert values[200] == 20.0 and values[600] == pytest.approx(11.0)
    assert steps == pytest.approx([18 / 800] * 799)


def test_a_warm_up_of_all_updates_leaves_the_term_off():
    assert [beta_at(update, 10, 20.0, 2.0, 1.0) for update in range(10)] == [None] * 10
