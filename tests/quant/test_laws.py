"""Laws that every rule obeys in its hard-rounding form, at every number of bits, on every grid, with every interval."""

import pytest
import torch

from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.dynamic import MaxAbs
from tdq_exp.quant.intervals.static import Static
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.nipq import Nipq
from tdq_exp.quant.rules.pact import PactWeights
from tdq_exp.quant.zero_point import ZeroPoint
from tests.quant.builders import BITS, GRIDS, INTERVALS, RULES, STEPS, make_quantizer, randn, stir

TIMES = torch.tensor([0, 7, 400, STEPS - 1])


def for_every_quantizer(law):
    """A test of a law for each rule, grid and interval, which goes through all numbers of bits.

    For each number a test of its own took longer to begin than the law to prove.
    """

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("interval", INTERVALS)
    def test(rule, grid, interval):
        for bits in BITS:
            try:
                law(rule, bits, grid, interval)
            except BaseException as error:
                error.add_note(f"at {bits} bits")
                raise

    return test


def beyond(quantizer, shape, seed=0):
    """Values over one and a half times the range of each sample, to both sides, and a bit."""
    s, z = quantizer.parameters_at(torch.zeros(shape))
    n, p = quantizer.grid.n, quantizer.grid.p
    low, high = 1.5 * (n - z) - 1, 1.5 * (p - z) + 1
    share = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (s * (low + share * (high - low))).detach()


@for_every_quantizer
def test_output_lies_on_the_grid(rule, bits, grid, interval):
    quantizer, time, _ = make_quantizer(rule, bits, grid, interval)
    with time.at(TIMES):
        x = beyond(quantizer, (4, 3, 5, 5))
        s, z = quantizer.parameters_at(x)
        x_hat = quantizer(x)
        codes = (x_hat / s).round()
        assert torch.equal(codes * s, x_hat)
        assert torch.equal(z, z.round())
        assert bool((codes + z >= quantizer.grid.n).all())
        assert bool((codes + z <= quantizer.grid.p).all())
        inside = (x / s - codes).abs()[
            (x > s * (quantizer.grid.n - z)) & (x < s * (quantizer.grid.p - z))
        ]
        assert (
            float(inside.detach().max()) <= 0.51
        )  # the nearest level, half a float's last bit aside


@for_every_quantizer
def test_training_and_inference_agree_where_training_rounds(rule, bits, grid, interval):
    quantizer, time, bank = make_quantizer(rule, bits, grid, interval)
    with time.at(TIMES):
        x = beyond(quantizer, (4, 6))
        trained = quantizer(x)
        s, z = quantizer.parameters_at(x)
        quantizer.eval()
        if bank is not None:
            bank.eval()
        with torch.no_grad():
            s_table, z_table = quantizer.parameters_at(x)
            # The table is made in one go, so s may differ in its last bits, and with it a rounding: compare levels.
            assert torch.allclose(s_table, s, rtol=1e-6, atol=0)
            assert torch.equal(z, z_table)
            difference = (quantizer(x) / s_table).round() - (trained / s).round()
        assert float(difference.abs().max()) <= (1 if bank is not None else 0)
        assert float((difference != 0).float().mean()) < 0.1


@for_every_quantizer
def test_representable_values_come_back_exactly(rule, bits, grid, interval):
    quantizer, time, _ = make_quantizer(rule, bits, grid, interval)
    n, p = quantizer.grid.n, quantizer.grid.p
    codes = torch.linspace(
        n, p, min(p - n + 1, 301)
    ).round()  # all of them where they are few, both ends always
    with time.at(TIMES):
        s, z = quantizer.parameters_at(torch.zeros(4, len(codes)))
        x = (s * (codes - z)).detach()
        assert torch.equal(quantizer(x), x)


@for_every_quantizer
def test_quantizing_twice_is_quantizing_once(rule, bits, grid, interval):
    quantizer, time, _ = make_quantizer(rule, bits, grid, interval)
    with time.at(TIMES):
        once = quantizer(beyond(quantizer, (4, 7)))
        assert torch.equal(quantizer(once), once)


@for_every_quantizer
def test_zero_comes_back_exactly(rule, bits, grid, interval):
    quantizer, time, _ = make_quantizer(rule, bits, grid, interval)
    with time.at(TIMES):
        assert torch.equal(quantizer(torch.zeros(4, 3)), torch.zeros(4, 3))


@for_every_quantizer
def test_step_is_positive_at_every_time_step(rule, bits, grid, interval):
    quantizer, _, bank = make_quantizer(rule, bits, grid, interval)
    stir(quantizer.interval if bank is None else bank, 1.0)  # as far as training may carry it
    s, z = quantizer.tables()
    assert len(s) == (1 if interval == "static" else STEPS)
    assert bool(torch.isfinite(s).all()) and float(s.min()) > 0
    assert bool((z == z.round()).all())
    if grid != "symmetric":
        assert float(z.min()) >= quantizer.grid.n and float(z.max()) <= quantizer.grid.p


@for_every_quantizer
def test_gradients_are_finite_and_reach_everything(rule, bits, grid, interval):
    quantizer, time, bank = make_quantizer(rule, bits, grid, interval)
    with time.at(TIMES):
        x = beyond(quantizer, (4, 64)).requires_grad_()
        quantizer(x).mul(randn(4, 64, seed=1)).sum().backward()
    parameters = {f"quantizer.{name}": value for name, value in quantizer.named_parameters()}
    if bank is not None:
        parameters |= {f"bank.{name}": value for name, value in bank.named_parameters()}
    expected = {"static": 1, "per_step": 1, "temporal": 8}[interval] + (grid != "symmetric")
    assert len(parameters) == expected
    for name, value in {"x": x, **parameters}.items():
        assert value.grad is not None, name
        assert bool(torch.isfinite(value.grad).all()), name
        assert float(value.grad.abs().max()) > 0, name


@for_every_quantizer
def test_what_is_far_outside_lands_on_the_ends(rule, bits, grid, interval):
    quantizer, time, _ = make_quantizer(rule, bits, grid, interval)
    far = torch.tensor([[-1e30, 1e30, -torch.inf, torch.inf]]).expand(4, 4).contiguous()
    with time.at(TIMES):
        s, z = quantizer.parameters_at(far)
        low, high = s * (quantizer.grid.n - z), s * (quantizer.grid.p - z)
        ends = torch.cat([low.expand(4, 1), high.expand(4, 1)] * 2, 1)
        assert torch.equal(quantizer(far), ends)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_quantized_in_single_precision(rule, training):
    quantizer, _, _ = make_quantizer(rule, 8, "affine", "static", s=0.013)
    quantizer.train(training)
    x = randn(4, 50).bfloat16()
    with torch.no_grad():
        assert quantizer(x).dtype == torch.float32
        assert torch.equal(quantizer(x), quantizer(x.float()))


@pytest.mark.parametrize("interval", INTERVALS)
def test_inference_works_with_gradients_switched_on(interval):
    quantizer, time, bank = make_quantizer("lsq", 4, "affine", interval)
    quantizer.eval()
    if bank is not None:
        bank.eval()
    x = randn(4, 6)
    with time.at(TIMES):
        with torch.no_grad():
            expected = quantizer(x)
        assert torch.equal(quantizer(x), expected)


# --- PACT's weights with the step that is theirs


@pytest.mark.parametrize("bits", BITS)
def test_weights_by_their_maximum_use_the_whole_grid(bits):
    grid = Grid(bits, symmetric=True)
    quantizer = PactWeights(grid, MaxAbs()).train()
    w = randn(8, 5, 3, 3)
    w_hat, s = quantizer(w), float(w.abs().max()) / grid.p
    codes = w_hat / s
    assert float((codes - codes.round()).abs().max()) < 1e-6 * grid.p + 1e-6
    assert float(codes.abs().max()) == pytest.approx(grid.p)
    assert torch.equal(quantizer(w_hat), w_hat)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_gradients_of_weights_by_their_maximum_pass_straight_through():
    grid = Grid(4, symmetric=True)
    quantizer = PactWeights(grid, MaxAbs()).train()
    w, g = randn(8, 5, 3, 3).requires_grad_(), randn(8, 5, 3, 3, seed=1)
    quantizer(w).mul(g).sum().backward()
    assert torch.equal(w.grad, g)  # the largest weight too: nothing is clipped


# --- NIPQ before its last phase


def noisy(histogram, s=0.1, z=3):
    grid = Grid(4, symmetric=False)
    quantizer = Nipq(grid, Static(), ZeroPoint(grid), histogram=histogram)
    quantizer.start(s, z)
    return quantizer.train()


@pytest.mark.parametrize("histogram", [True, False])
def test_noise_stays_within_half_a_step_and_clipped_values_get_none(histogram):
    quantizer = noisy(histogram)
    x = torch.linspace(-0.6, 1.6, 4001)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        x_hat = quantizer(x)
    s = float(quantizer.interval.step_size())
    low, high = -3 * s, 12 * s
    outside = (x < low - 1e-6) | (x > high + 1e-6)
    assert torch.allclose(x_hat[outside], x[outside].clamp(low, high))
    error = (x_hat - x)[~outside]
    assert float(error.abs().max()) <= s / 2 + 1e-6
    assert float(error.std()) == pytest.approx(s / 12**0.5, rel=0.05)
    assert abs(float(error.mean())) < 0.03 * s


@pytest.mark.parametrize("histogram", [True, False])
def test_a_value_on_the_bound_itself_gets_no_noise(histogram):
    # Zeros on an affine grid with z = 0: what a softmax or a ReLU gives in numbers.
    quantizer = noisy(histogram, z=0)
    x = torch.cat([torch.zeros(1, 50), torch.full((1, 50), 0.33)], 1)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(quantizer(x)[:, :50], torch.zeros(1, 50))


def test_noise_follows_the_histogram_of_the_rounding_error():
    # All values lie a quarter of a step above a level: their rounding error is -1/4, and the noise must be that too.
    quantizer = noisy(histogram=True)
    s = float(quantizer.interval.step_size())
    x = s * (torch.arange(-2, 11).repeat(50) + 0.25)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        u = (quantizer(x) - x) / s
    assert float((u + 0.25).abs().max()) < 1.5 / 256
    quantizer.histogram = False
    with torch.no_grad():
        u = (quantizer(x) - x) / s
    assert float(u.std()) == pytest.approx(12**-0.5, rel=0.1)


def test_noise_is_drawn_anew_at_every_call_from_the_seeded_generator():
    quantizer = noisy(histogram=True)
    x = randn(2, 300) * 0.3
    torch.manual_seed(0)
    first, second = quantizer(x), quantizer(x)
    torch.manual_seed(0)
    again = quantizer(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_inference_never_adds_noise():
    quantizer = noisy(histogram=True)
    x = randn(2, 300) * 0.3
    with torch.no_grad():
        rough = quantizer(x)
        x_hat = quantizer.eval()(x)
    s = quantizer.interval.step_size()
    assert not torch.equal(rough, x_hat)
    assert torch.equal((x_hat / s).round() * s, x_hat)


def test_zero_point_can_come_back_from_beyond_the_end_of_the_grid():
    # An update that carries it a little too far must not be its last: the gradient still has to say "back".
    grid = Grid(4, symmetric=False)
    zero_point = ZeroPoint(grid)
    quantizer = RULES["lsq"](grid, Static(), zero_point, gradient_scale=False).train()
    quantizer.start(0.1, 0)
    optimizer = torch.optim.SGD(zero_point.parameters(), lr=1e-3)
    with torch.no_grad():
        zero_point.zeta.fill_(-0.01)
    x = torch.linspace(-1.0, 0.5, 64)[None]  # mostly negative: z = 0 clips two thirds of it
    for _ in range(20):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert float(zero_point(torch.tensor(0.1))) > 0


def test_a_rule_is_not_defined_by_the_base_class():
    grid = Grid(4, symmetric=True)
    with pytest.raises(NotImplementedError, match="Quantizer"):
        Quantizer(grid, Static()).train()(torch.zeros(2, 2))


# --- Grids


@pytest.mark.parametrize(
    ("bits", "symmetric", "reduced", "n", "p"),
    [
        (2, True, False, -1, 1), (3, True, False, -3, 3), (4, True, False, -7, 7), (8, True, False, -127, 127),
        (16, True, False, -32767, 32767), (2, False, False, 0, 3), (4, False, False, 0, 15), (8, False, False, 0, 255),
        (16, False, False, 0, 65535), (3, True, True, -2, 2), (4, True, True, -6, 6), (8, True, True, -126, 126),
        (3, False, True, 0, 6), (4, False, True, 0, 14),
    ],
)  # fmt: skip
def test_codes_of_a_grid(bits, symmetric, reduced, n, p):
    grid = Grid(bits, symmetric, reduced)
    assert (grid.n, grid.p) == (n, p)


@pytest.mark.parametrize("bits", [0, 1, 17, 3.5, -4, True, "4", None])
def test_a_grid_refuses_a_number_of_bits(bits):
    with pytest.raises(ValueError, match=r"bits=.*whole number from 2 to 16"):
        Grid(bits, symmetric=False)


def test_two_bits_leave_nothing_of_the_releases_symmetric_grid():
    with pytest.raises(ValueError, match="3 bits"):
        Grid(2, symmetric=True, reduced=True)
