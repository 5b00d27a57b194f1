"""Calibration finds what brute force finds, sets everything once or nothing, and does not depend on who looked."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdq_exp.quant import calibrate
from tdq_exp.quant.calibrate import Calibration, Observer, calibrating, least_error, start_value
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.static import Static
from tdq_exp.quant.intervals.temporal import Temporal
from tdq_exp.quant.layers import QuantLinear
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import SILU_MINIMUM, ReleaseDetails
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.nipq import NipqWeights
from tdq_exp.quant.rules.pact import PactWeights
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint
from tests.oracles import rounding
from tests.quant.builders import STEPS, inputs, load_model, make_net, make_recipe, randn


def quantiles(count):
    """A standard normal sample without the luck of a draw."""
    return torch.special.ndtri((torch.arange(count) + 0.5) / count)


NORMAL, MANY = quantiles(400), quantiles(8000)
DATA = {
    "normal": NORMAL,
    "drawn": randn(300),
    "shifted_by_half": NORMAL + 0.5,
    "shifted": NORMAL + 1.5,
    "silu": F.silu(2 * NORMAL),
    "positive": NORMAL.abs() ** 2,
    "negative": -NORMAL.abs(),
    "heavy_tails": NORMAL * NORMAL.abs() ** 2,
    "uniform": torch.linspace(-1, 3, 300),
    "softmax": (3 * randn(20, 15)).softmax(1).flatten(),
    "small": 1e-4 * NORMAL,
    "far": 20 + NORMAL,
}


def error(values, s, z, grid):
    """Mean squared error of (s, z), by the definition."""
    return rounding.mean_squared_error(values.tolist(), s, z, grid.n, grid.p)


def brute_force(values, grid):
    """The least error over a dense net of (s, z): every zero point, and 400 steps from far too small to far too large."""
    values = values.double()
    reach = float(values.abs().max())
    best = math.inf
    for z in [0] if grid.symmetric else range(grid.n, grid.p + 1):
        top = 1.2 * reach / max(min(x for x in (grid.p - z, z - grid.n) if x > 0), 1)
        for s in torch.linspace(math.log(top / 300), math.log(top), 400).exp().tolist():
            x_hat = s * ((values / s).round() + z).clamp(grid.n, grid.p).sub(z)
            best = min(best, float((x_hat - values).square().mean()))
    return best


# --- The search


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("data", DATA)
def test_least_error_is_within_two_percent_of_brute_force(data, symmetric, bits):
    values, grid = DATA[data], Grid(bits, symmetric)
    s, z = least_error(values, grid, float(values.min()), float(values.max()))
    assert s > 0
    assert isinstance(z, int) and grid.n <= z <= grid.p
    assert error(values, s, z, grid) <= 1.02 * brute_force(values, grid)


@pytest.mark.parametrize(
    ("bits", "values"),
    [(2, MANY.sign() * MANY.abs() ** 1.5 + 1.5), (2, MANY + 0.5), (3, MANY + 0.7), (4, MANY + 0.1)],
)
def test_least_error_is_found_where_there_are_several_valleys(bits, values):
    # With few levels the error as a function of (s, z) has a valley for each z; one side at a time may miss the deepest.
    grid = Grid(bits, symmetric=False)
    s, z = least_error(values, grid, float(values.min()), float(values.max()))
    assert error(values, s, z, grid) <= 1.02 * brute_force(values, grid)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_have_less_error_and_fall_by_about_a_quarter_each(symmetric):
    values = randn(3000)
    errors = []
    for bits in range(2, 11):
        grid = Grid(bits, symmetric)
        s, z = least_error(values, grid, float(values.min()), float(values.max()))
        errors.append(
            float(
                (s * ((values / s).round() + z).clamp(grid.n, grid.p).sub(z) - values)
                .square()
                .mean()
            )
        )
    assert all(more < 0.5 * less for less, more in zip(errors, errors[1:], strict=False))


def test_representable_data_have_no_error():
    grid = Grid(4, symmetric=False)
    values = 0.37 * (torch.arange(0, 16) - 5.0)
    s, z = least_error(values, grid, float(values.min()), float(values.max()))
    assert z == 5
    assert s == pytest.approx(0.37, rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_of_zeros_gets_a_positive_step(symmetric):
    s, z = least_error(torch.zeros(10), Grid(4, symmetric), 0.0, 0.0)
    assert s > 0 and z == 0
    interval = Static()
    interval.start(s)
    assert float(interval.step_size().detach()) > 0


def test_extremes_beyond_the_sample_do_not_break_the_search():
    # The kept sample need not hold the largest value of the tensor.
    values, grid = randn(500), Grid(4, symmetric=False)
    s, z = least_error(values, grid, -30.0, 50.0)
    assert error(values, s, z, grid) <= 1.1 * brute_force(values, grid)


# --- What a rule or a habit asks for


def observed(x, fixed=False, batches=1):
    observer = Observer(Calibration(batches), fixed)
    observer(x)
    return observer


def test_weights_of_nipq_start_at_their_maximum():
    grid, w = Grid(4, symmetric=True), randn(20, 7)
    s, z = start_value(NipqWeights(grid, Static()), observed(w, fixed=True), "error")
    assert (s, z) == (pytest.approx(float(w.abs().max()) / 7), 0)


def test_moments_follow_the_releases_formulas():
    x = F.silu(randn(6, 4, 5)) + 0.1
    mean = sum(float(row.mean()) for row in x) / 6
    std = sum(float(row.flatten().std()) for row in x) / 6
    signed = Grid(4, symmetric=True, reduced=True)
    s, z = start_value(Lsq(signed, Static(raw=True)), observed(x), "moments")
    assert (s, z) == (pytest.approx((mean + 3 * std) / 6, rel=1e-5), 0)
    after_silu = Grid(4, symmetric=False, reduced=True)
    bounded = Lsq(after_silu, Static(raw=True), LowerBound(after_silu, SILU_MINIMUM, learned=False))
    s, z = start_value(bounded, observed(x), "moments")
    assert s == pytest.approx((mean + 16 * std) / 14, rel=1e-5)
    assert z == round(0.2785 / s)
    w = randn(20, 7)
    s, z = start_value(Lsq(signed, Static(raw=True)), observed(w, fixed=True), "moments")
    assert (s, z) == (pytest.approx(float(w.abs().max()) / 6), 0)


def test_a_started_lower_bound_gives_the_zero_point_that_was_found():
    grid = Grid(4, symmetric=False)
    quantizer = Lsq(grid, Static(), LowerBound(grid))
    quantizer.start(0.07, 4)
    s, z = quantizer.parameters_at(torch.zeros(1, 2))
    assert float(s.detach()) == pytest.approx(0.07) and float(z.detach()) == 4
    quantizer = Lsq(grid, Static(), ZeroPoint(grid))
    for z in range(16):
        quantizer.start(0.07, z)
        assert float(quantizer.parameters_at(torch.zeros(1, 2))[1].detach()) == z


# --- Observers


def test_an_observer_keeps_the_extremes_of_everything_and_a_sample_of_the_rest(monkeypatch):
    monkeypatch.setattr(calibrate, "KEPT", 100)
    calibration = Calibration(batches=4)
    observer = Observer(calibration, fixed=False)
    batches = [randn(8, 50, seed=seed) for seed in range(4)]
    for number, x in enumerate(batches):
        calibration.batch = number
        observer(x)
    everything = torch.cat(batches)
    assert observer.extremes() == (float(everything.min()), float(everything.max()))
    kept = observer.values()
    assert len(kept) == 100
    assert bool(torch.isin(kept, everything).all())
    for part, x in zip(kept.split(25), batches, strict=True):
        assert bool(torch.isin(part, x).all())


def test_kept_values_are_in_the_order_of_the_batches():
    calibration = Calibration(batches=3)
    observer = Observer(calibration, fixed=False)
    for number in (2, 0, 1):
        calibration.batch = number
        observer(torch.full((1, 2), float(number)))
    assert observer.values().tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_a_last_batch_of_few_samples_counts_as_many_as_it_has(monkeypatch):
    monkeypatch.setattr(calibrate, "KEPT", 1024)
    x = randn(65, 3, 8, 8)
    x[64] += 10
    seen = {}
    for name, batches in (("one", [x]), ("two", [x[:64], x[64:]])):
        calibration = Calibration(len(batches))
        seen[name] = observer = Observer(calibration, fixed=False)
        for calibration.batch, batch in enumerate(batches):
            observer(batch)

    assert seen["two"].moments() == pytest.approx(seen["one"].moments(), rel=1e-5)
    of_last = (seen["two"].values() > 5).float().mean()
    assert float(of_last) == pytest.approx(1 / 65, rel=0.1)


def test_an_observer_looks_once_at_each_batch_and_once_at_a_weight():
    calibration = Calibration(batches=2)
    moving, fixed = Observer(calibration, fixed=False), Observer(calibration, fixed=True)
    for observer in (moving, fixed):
        calibration.batch = 0
        observer(torch.ones(2, 3))
        observer(5 * torch.ones(2, 3))
        calibration.batch = 1
        observer(2 * torch.ones(2, 3))
    assert moving.extremes() == (1.0, 2.0)
    assert fixed.extremes() == (1.0, 1.0)


# --- The block


@pytest.fixture
def small(monkeypatch):
    """Calibration with few values, for speed."""
    monkeypatch.setattr(calibrate, "KEPT", 256)


def fresh(interval="temporal", rule="lsq", **options):
    return make_net(make_recipe(rule, interval, **options), calibrated=False)


def count_starts(net):
    """{name: how often it was started}, kept up to date."""
    counts = {name: 0 for name, module in net.named_modules() if isinstance(module, Quantizer)}

    def counting(name, start):
        def call(s, z):
            counts[name] += 1
            start(s, z)

        return call

    for name in counts:
        quantizer = net.get_submodule(name)
        quantizer.start = counting(name, quantizer.start)
    return counts


@pytest.mark.parametrize("rule", ["lsq", "pact", "nipq"])
def test_values_pass_unchanged_and_every_quantizer_is_set_once(rule, small):
    net = fresh(rule=rule)
    counts = count_starts(net)
    x, t = inputs(8)
    with torch.no_grad(), calibrating(net, 2) as calibration:
        expected = load_model("tiny").build().eval()(x, t)[0]
        for number in range(2):
            calibration.batch = number
            assert torch.allclose(net(x, t)[0], expected, atol=1e-6)
        assert set(counts.values()) == {0}
    assert len(counts) > 50
    assert set(counts.values()) == {1}
    assert calibration.found.keys() == counts.keys()
    for name in counts:
        quantizer = net.get_submodule(name)
        assert quantizer.observer is None
        if not isinstance(quantizer, PactWeights):
            s, z = calibration.found[name]
            interval = quantizer.interval
            rho = (
                interval.bank.biases[-1][interval.row]
                if isinstance(interval, Temporal)
                else interval.rho
            )
            assert float(F.softplus(rho.detach())) == pytest.approx(s, rel=1e-5), name
            if isinstance(quantizer.zero_point, ZeroPoint):
                assert float(quantizer.tables()[1]) == z, name
            if isinstance(quantizer.zero_point, LowerBound):
                assert float(quantizer.zero_point.beta.detach()) == pytest.approx(
                    -s * z, rel=1e-5
                ), name
    with torch.no_grad():
        assert not torch.allclose(net(x, t)[0], expected, atol=1e-6)


def test_static_start_values_are_those_of_each_tensor(monkeypatch):
    monkeypatch.setattr(calibrate, "KEPT", 512)  # no value of x is left out
    net = fresh("static")
    x, t = inputs(8)
    with torch.no_grad(), calibrating(net, 1) as calibration:
        net(x, t)
    grid = Grid(4, symmetric=False)
    s, z = least_error(x.flatten(), grid, float(x.min()), float(x.max()))
    assert calibration.found["conv_in.input_quantizer"] == (pytest.approx(s, rel=1e-5), z)
    w = net.conv_in.layer.weight.detach()
    s, z = least_error(w.flatten(), Grid(4, symmetric=True), float(w.min()), float(w.max()))
    assert calibration.found["conv_in.weight_quantizer"] == (pytest.approx(s, rel=1e-5), 0)


def test_an_error_inside_leaves_everything_as_it_was(small):
    net = fresh()
    before = copy.deepcopy(net.state_dict())
    with (
        pytest.raises(KeyError, match="inside"),
        torch.no_grad(),
        calibrating(net, 2) as calibration,
    ):
        net(*inputs())
        raise KeyError("inside")
    assert calibration.found == {}
    assert all(module.observer is None for module in net.modules() if isinstance(module, Quantizer))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_quantizer_that_saw_nothing_is_an_error_and_nothing_is_set(small):
    net = fresh()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="saw nothing"), calibrating(net, 1):
        pass
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(module.observer is None for module in net.modules() if isinstance(module, Quantizer))


class Pair(nn.Module):
    """Two layers, the second of which sees nothing but what the first lets through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        grid = Grid(4, symmetric=False)
        for name, sizes in (("first", (6, 8)), ("second", (8, 3))):
            weight = Lsq(Grid(4, symmetric=True), Static())
            self.add_module(
                name, QuantLinear(nn.Linear(*sizes), weight, Lsq(grid, Static(), ZeroPoint(grid)))
            )
        self.eval()

    def forward(self, x):
        return self.second(self.first(x).relu())


def run(net, numbers, gather=None, batches=4):
    """Calibrates with the batches of these numbers; no two batches are alike."""
    with torch.no_grad(), calibrating(net, batches) as calibration:
        calibration.gather = gather
        for number in numbers:
            calibration.batch = number
            net((1 + number) * randn(50, 6, seed=number) + number / 4)
    return calibration.found


def shard(net, numbers):
    """What the observers of a process with these batches saw."""
    seen = []

    def gather(mine):
        seen.append(dict(mine))
        return [mine]

    run(net, numbers, gather)
    return seen


@pytest.mark.parametrize("shares", [((0, 2), (0, 1, 3)), ((0, 1, 2, 3), (0,)), ((0, 3, 1), (2, 0))])
def test_two_shards_gathered_equal_one_whole(shares, small):
    others = iter(shard(Pair(), shares[1]))
    found = run(Pair(), shares[0], lambda mine: [mine, next(others)])
    assert found == run(Pair(), range(4))
    assert found != run(Pair(), shares[0]) or len(shares[0]) == 4


def test_the_order_of_batches_does_not_matter(small):
    assert run(Pair(), (3, 1, 0, 2)) == run(Pair(), range(4))


def test_every_batch_counts(small):
    whole = run(Pair(), range(4))
    for left_out in range(4):
        assert run(Pair(), [number for number in range(4) if number != left_out]) != whole


def test_kept_start_values_can_be_applied_to_another_copy(small):
    first, second = Pair(), Pair()
    found = run(first, range(4))
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    calibrate.apply(second, found)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_start_values_of_another_network_are_refused(damage):
    net = fresh("static")
    found = {
        name: (0.1, 0) for name, module in net.named_modules() if isinstance(module, Quantizer)
    }
    if damage == "missing":
        del found["conv_in.input_quantizer"]
    else:
        found["elsewhere.input_quantizer"] = (0.1, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError, match="elsewhere" if damage == "extra" else "conv_in"):
        calibrate.apply(net, found)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_releases_start_on_a_whole_network(small):
    habits = ReleaseDetails(
        reduced_grids=True, symmetric_activations=True, raw_step=True, start="moments"
    )
    net = fresh("static", habits=habits)
    x, t = inputs(8)
    with torch.no_grad(), calibrating(net, 1, habits.start) as calibration:
        net(x, t)
    rows = x.flatten(1)
    expected = (float(rows.mean(1).mean()) + 3 * float(rows.std(1).mean())) / 6
    assert calibration.found["conv_in.input_quantizer"] == (pytest.approx(expected, rel=1e-5), 0)
    assert float(net.conv_in.input_quantizer.interval.rho.detach()) == pytest.approx(
        expected, rel=1e-5
    )


def test_calibration_lowers_the_error_of_the_network():
    x, t = inputs(8)
    with torch.no_grad():
        expected = load_model("tiny").build().eval()(x, t)[0]
        net = fresh("static", bits=8)
        with calibrating(net, 1):
            net(x, t)
        good = float((net(x, t)[0] - expected).square().mean())
        for factor in (3.0, 0.1):  # from three times too coarse to three times too narrow
            for module in net.modules():
                if isinstance(module, Quantizer):
                    module.interval.start(factor * float(module.interval.step_size()))
            assert good < 0.5 * float((net(x, t)[0] - expected).square().mean())


def test_every_group_of_time_steps_starts_alike(small):
    net = fresh("per_step")
    with torch.no_grad(), calibrating(net, 1) as calibration:
        net(*inputs(8))
    for name, quantizer in activation_quantizers(net).items():
        s, table = calibration.found[name][0], quantizer.tables()[0]
        assert len(table) == STEPS
        assert table.tolist() == pytest.approx([s] * STEPS, rel=1e-5), name
