"""All generators at once against one after another; their state dict; their table; their start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tdq_exp.quant.intervals.temporal import (
    GeneratorBank,
    GeneratorOptions,
    Temporal,
    TemporalIntervals,
    encode_time,
)
from tdq_exp.quant.time import TimeContext
from tests.oracles import generator
from tests.quant.builders import STEPS, make_net, make_recipe, randn, stir

NAMES = ["conv_in.input", "mid.0.q", "mid.0.k", "out"]


def make_bank(layers=4, seed=0, names=NAMES, steps=STEPS, **options):
    torch.manual_seed(seed)
    options = {"encoding": 16, "width": 8} | options
    bank = GeneratorBank(names, TimeContext(steps), GeneratorOptions(layers=layers, **options))
    for row in range(len(names)):
        bank.start(row, -2.0 + 0.3 * row)
    return bank


# --- enc(t)


@pytest.mark.parametrize("width", [2, 16, 128, 192])
def test_encoding_equals_the_formula_cosines_first(width):
    times = [0, 1, 2, 17, 500, 999]
    found = encode_time(torch.tensor(times), width)
    assert found.dtype == torch.float32
    assert found.shape == (6, width)
    for row, t in enumerate(times):
        assert found[row].tolist() == pytest.approx(generator.encode(t, width), abs=1e-6)


def test_encoding_by_hand():
    code = encode_time(torch.tensor([3]), 4)[0].tolist()
    frequency = math.exp(-math.log(10000) / 2)  # of i = 1 of 2: a hundredth
    assert frequency == pytest.approx(0.01)
    assert code == pytest.approx(
        [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)], abs=1e-6
    )


def test_every_time_step_has_a_code_of_its_own():
    codes = encode_time(torch.arange(1000), 16)
    assert float(torch.pdist(codes).min()) > 1e-2


# --- Values and gradients


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_all_at_once_equals_one_by_one_in_value(layers):
    bank = make_bank(layers)
    times = [0, 5, 5, 410, 999]
    with bank.time.at(torch.tensor(times)):
        found = bank.step_sizes()
    assert found.shape == (4, 5)
    for row, name in enumerate(NAMES):
        f = generator.network(bank.state_dict(), name, layers)
        expected = [float(generator.step_size(f, t).detach()) for t in times]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_all_at_once_equals_one_by_one_in_gradient(layers):
    bank = make_bank(layers)
    times, g = [0, 410, 999], randn(4, 3)
    with bank.time.at(torch.tensor(times)):
        bank.step_sizes().backward(g)
    for row, name in enumerate(NAMES):
        f = generator.network(bank.state_dict(), name, layers)
        total = sum(generator.step_size(f, t) * float(g[row, b]) for b, t in enumerate(times))
        total.backward()
        for layer, linear in enumerate(part for part in f if isinstance(part, torch.nn.Linear)):
            assert torch.allclose(
                bank.weights[layer].grad[row].double(), linear.weight.grad, rtol=1e-4, atol=1e-6
            )
            assert torch.allclose(
                bank.biases[layer].grad[row].double(), linear.bias.grad, rtol=1e-4, atol=1e-6
            )


def test_a_generator_is_private_to_its_quantizer():
    bank = make_bank()
    with bank.time.at(torch.tensor([3, 700])):
        Temporal(bank, 2).step_size().sum().backward()
    for parameter in bank.parameters():
        others = [0, 1, 3]
        assert float(parameter.grad[others].abs().max()) == 0
        assert float(parameter.grad[2].abs().max()) > 0


def test_one_time_for_the_whole_batch_gives_one_step_size_each():
    bank = make_bank()
    with bank.time.at(33):
        assert bank.step_sizes().shape == (4,)
        assert Temporal(bank, 1).step_size().dim() == 0
        assert float(Temporal(bank, 1).step_size().detach()) == float(bank.step_sizes()[1].detach())


def test_the_matrix_is_computed_once_for_a_time_step_and_anew_for_the_next():
    bank = make_bank()
    with bank.time.at(torch.tensor([1, 2])):
        first = bank.step_sizes()
        assert bank.step_sizes() is first
    with bank.time.at(torch.tensor([1, 3])):
        assert not torch.equal(bank.step_sizes(), first)


def test_a_matrix_without_gradient_is_not_taken_for_one_with():
    bank = make_bank()
    with bank.time.at(torch.tensor([1, 2])):
        with torch.no_grad():
            bank.step_sizes()
        bank.step_sizes().sum().backward()
    assert float(bank.weights[0].grad.abs().max()) > 0


def test_a_changed_weight_is_seen_at_once_at_the_same_time_step():
    bank = make_bank()
    with bank.time.at(torch.tensor([1, 2])), torch.no_grad():
        before = bank.step_sizes().clone()
        bank.biases[-1].add_(1.0)
        assert bool((bank.step_sizes() > before).all())


@pytest.mark.parametrize("what", ["step_sizes", "table"])
def test_autocast_leaves_generators_in_single_precision(what):
    bank = make_bank(encoding=128, width=64)
    bank.train(what == "step_sizes")
    t = torch.arange(0, STEPS, 50)
    with torch.no_grad():
        expected = bank.generate(encode_time(t, 128))
        with bank.time.at(t), torch.autocast("cpu", torch.bfloat16):
            found = bank.step_sizes() if what == "step_sizes" else bank.table()[:, t]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


# --- Table


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_table_equals_evaluation_at_each_time_step(steps):
    bank = make_bank(steps=steps)
    table = bank.table()
    assert table.shape == (4, steps)
    assert not table.requires_grad
    with torch.no_grad():
        for t in {0, steps // 3, steps - 1}:
            single = bank.generate(encode_time(torch.tensor([t]), 16))[:, 0]
            assert torch.allclose(table[:, t], single, rtol=1e-5, atol=0)


def test_inference_reads_the_table_to_the_bit():
    bank = make_bank().eval()
    t = torch.tensor([0, 3, 3, 999])
    for row in range(4):
        with bank.time.at(t):
            assert torch.equal(Temporal(bank, row).step_size(), bank.table()[row][t])
        with bank.time.at(999):
            assert torch.equal(Temporal(bank, row).step_size(), bank.table()[row][999])
        assert torch.equal(Temporal(bank, row).table(), bank.table()[row])


@pytest.mark.parametrize("t", [5, [5, 7, 5]])
def test_generators_learn_in_eval_mode_as_other_step_sizes_do(t):
    """A network is trained in that mode where its dropout is not wanted."""
    bank, found = make_bank(dropout=0.0), []
    bank.time.set(torch.tensor(t))
    for training in (True, False):
        s = Temporal(bank.train(training), 1).step_size()
        assert training or torch.equal(s, bank.table()[1][torch.tensor(t)])
        found.append(torch.autograd.grad(s.square().sum(), list(bank.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert bool(mine[1].abs().sum() > 0)


@pytest.mark.parametrize("t", [5, [5, 7]])
def test_a_time_step_on_the_cpu_is_read_in_a_table_on_a_gpu(t, monkeypatch):
    """As diffusers' pipelines give it; the table here has no memory."""
    bank = make_bank().eval()
    with FakeTensorMode(), torch.no_grad():
        table = torch.zeros(len(NAMES), STEPS, device="cuda")
        monkeypatch.setattr(bank, "table", lambda: table)
        bank.time.set(torch.tensor(t))
        assert Temporal(bank, 1).step_size().device.type == "cuda"


def test_table_is_kept_while_nothing_changes():
    bank = make_bank()
    assert bank.table() is bank.table()


def adamw(bank):
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.01)
    with bank.time.at(torch.tensor([1, 2])):
        bank.step_sizes().sum().backward()
    optimizer.step()


def averaged(bank):
    other = make_bank(seed=1)
    with torch.no_grad():
        torch._foreach_lerp_(list(bank.parameters()), list(other.parameters()), 0.5)


CHANGES = {
    "optimiser": adamw,
    "fused_optimiser": lambda bank: [
        setattr(p, "grad", torch.ones_like(p)) for p in bank.parameters()
    ] and torch.optim.AdamW(bank.parameters(), lr=0.01, fused=True).step(),
    "average": averaged,
    "load": lambda bank: bank.load_state_dict(make_bank(seed=1).state_dict()),
    "start": lambda bank: bank.start(0, 1.0),
    "take_back": lambda bank: bank.take_back(make_bank(seed=1, names=NAMES[:2])),
    "one_number": lambda bank: stir(bank, 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_table_is_renewed_when_a_weight_changes(change):
    bank = make_bank().eval()
    old = bank.table().clone()
    CHANGES[change](bank)
    with torch.no_grad():
        expected = bank.generate(bank.encodings)
    assert torch.equal(bank.table(), expected)
    assert not torch.equal(bank.table(), old)


def test_table_moves_with_its_bank():
    # `.to(...)` replaces what a parameter holds and leaves the parameter itself; another device is like another type.
    bank = make_bank()
    bank.table()
    bank.double()
    assert bank.table().dtype == torch.float64


# --- Dropout


def test_dropout_acts_while_training_only():
    bank = make_bank(dropout=0.5)
    plain = make_bank(dropout=0.0)
    t = torch.tensor([3, 900])
    with torch.no_grad():
        bank.train()
        with bank.time.at(t):
            first = bank.step_sizes()
        with bank.time.at(t):
            second = bank.step_sizes()
        assert not torch.equal(first, second)
        assert torch.equal(bank.table(), plain.table())  # never in a table, in training either
        assert bank.training
        bank.eval()
        with bank.time.at(t):
            assert torch.equal(Temporal(bank, 0).step_size(), plain.table()[0][t])


def test_dropout_is_before_the_last_layer_alone():
    # With a last layer of zeros nothing before it can be seen; dropout after it, or of the code itself, could.
    bank = make_bank(dropout=0.9, layers=3).train()
    with torch.no_grad():
        bank.weights[-1].zero_()
        with bank.time.at(torch.arange(20)):
            expected = F.softplus(bank.biases[-1]).expand(4, 20)
            assert torch.allclose(bank.step_sizes(), expected)
        # Ones in the last layer show what is dropped: hidden units, each scaled by 1 / (1 - 0.9).
        bank.weights[-1].fill_(1.0)
        bank.biases[-1].zero_()
        bank.weights[1].zero_()
        bank.biases[1].fill_(1.0)
        with bank.time.at(torch.arange(500)):
            found = bank.step_sizes()
    left = (found / 10).round()  # how many of 8 units: softplus leaves a 10 or more as it is
    assert torch.allclose(found[left > 0], 10 * left[left > 0], atol=1e-3)
    assert float(left.mean()) == pytest.approx(0.8, abs=0.1)


# --- Start


@pytest.mark.parametrize("s0", [0.004, 0.1, 2.0])
def test_he_initialisation_spreads_the_start_moderately(s0):
    torch.manual_seed(0)
    names = [str(number) for number in range(60)]
    intervals, bank = TemporalIntervals(encoding=128).make(names, TimeContext(1000))
    for interval in intervals:
        interval.start(s0)
    ratio = (bank.table() / s0).flatten()
    low, middle, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert 0.8 < low < 0.97
    assert 0.95 < middle < 1.05
    assert 1.03 < high < 1.25


def test_he_initialisation_is_of_the_last_layer_alone():
    torch.manual_seed(0)
    names = [str(number) for number in range(60)]
    he = GeneratorBank(names, TimeContext(10), GeneratorOptions(128, he=True))
    default = GeneratorBank(names, TimeContext(10), GeneratorOptions(128, he=False))
    assert [tuple(w.shape) for w in he.weights] == [
        (60, 64, 128),
        (60, 64, 64),
        (60, 64, 64),
        (60, 1, 64),
    ]
    assert float(he.weights[-1].detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert float(default.weights[-1].detach().abs().max()) <= 64**-0.5
    for bank in (he, default):
        for weight, bias in zip(bank.weights[:-1], bank.biases[:-1], strict=True):
            bound = weight.shape[2] ** -0.5
            assert 0.98 * bound < float(weight.abs().max()) <= bound
            assert 0.98 * bound < float(bias.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_generators_start_differently_from_each_other():
    bank = make_bank()
    for weight in bank.weights:
        assert not torch.equal(weight[0], weight[1])


def test_start_sets_one_generator_and_no_other():
    bank = make_bank()
    before = bank.table().clone()
    Temporal(bank, 1).start(0.7)
    assert float(bank.biases[-1][1].detach()) == pytest.approx(
        math.log(math.exp(0.7) - 1), rel=1e-5
    )
    assert torch.equal(bank.table()[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(bank.table()[1], before[1])


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": 15},
        {"encoding": 0},
        {"layers": 0},
        {"width": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
)
def test_impossible_shapes_are_refused(options):
    with pytest.raises(ValueError, match=r"tdq\.interval"):
        make_bank(**options)


# --- State dict


def test_state_dict_shows_one_generator_per_quantizer():
    state = make_bank(layers=2).state_dict()
    expected = {
        f"{name}.{layer}.{kind}"
        for name in NAMES
        for layer in (0, 1)
        for kind in ("weight", "bias")
    }
    assert state.keys() == expected
    assert state["mid.0.q.0.weight"].shape == (8, 16)
    assert state["mid.0.q.0.bias"].shape == (8,)
    assert state["mid.0.q.1.weight"].shape == (1, 8)
    assert state["mid.0.q.1.bias"].shape == (1,)


def test_state_dict_of_a_network_names_its_quantizers():
    net = make_net(make_recipe("lsq", "temporal"), calibrated=False)
    state = net.state_dict()
    shown = {key for key in state if key.startswith("generators.")}
    assert len(shown) == 8 * len(net.generators.names)
    for name in (
        "conv_in.input",
        "mid_block.attentions.0.input",
        "mid_block.attentions.0.probabilities",
    ):
        assert f"generators.{name}.3.weight" in shown


def test_state_round_trip_is_exact():
    source, target = make_bank(seed=0), make_bank(seed=1)
    target.load_state_dict(source.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True)
    )
    assert torch.equal(source.table(), target.table())


def test_rows_are_found_by_name_not_by_place():
    source, target = make_bank(seed=0), make_bank(seed=1, names=NAMES[::-1])
    target.load_state_dict(source.state_dict())
    assert torch.allclose(target.table().flip(0), source.table(), rtol=1e-6)


def test_a_state_dict_is_a_copy_free_view_without_graph():
    bank = make_bank()
    state = bank.state_dict()
    assert not any(value.requires_grad for value in state.values())
    assert all(value.requires_grad for value in bank.state_dict(keep_vars=True).values())


def damaged(how):
    state = dict(make_bank(seed=1).state_dict())
    if how == "missing":
        del state["mid.0.k.2.bias"]
    elif how == "unexpected":
        state["mid.0.v.0.weight"] = torch.zeros(8, 16)
    elif how == "misshapen":
        state["out.0.weight"] = torch.zeros(8, 15)
    else:
        state["out.0.weight"] = torch.zeros(1, 8, 16)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"Missing key.*mid\.0\.k\.2\.bias"),
        ("unexpected", r"Unexpected key.*mid\.0\.v\.0\.weight"),
        ("misshapen", r"out\.0\.weight.*\(8, 15\).*\(8, 16\)"),
        ("one_axis_more", r"out\.0\.weight"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_state_dict_that_does_not_fit_is_an_error(how, message, whole):
    bank = make_bank()
    net = torch.nn.ModuleDict({"generators": bank}) if whole else bank
    state = damaged(how)
    if whole:
        state = {f"generators.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        net.load_state_dict(state)


def test_encodings_are_not_saved():
    assert not any("encodings" in key for key in make_bank().state_dict())


# --- Parts of a bank


def test_a_subset_holds_copies_of_the_named_generators():
    bank = make_bank()
    part = bank.subset([3, 1])
    assert part.names == ["out", "mid.0.q"]
    assert torch.allclose(part.table(), bank.table()[[3, 1]], rtol=1e-5, atol=0)
    assert all(
        torch.equal(mine, whole[[3, 1]])
        for mine, whole in zip(part.parameters(), bank.parameters(), strict=True)
    )
    assert part.time is bank.time
    assert all(parameter.requires_grad for parameter in part.parameters())
    before = bank.table().clone()
    stir(part, 0.5)
    assert torch.equal(bank.table(), before)


def test_take_back_brings_the_subset_home_and_touches_nothing_else():
    bank = make_bank()
    before = bank.table().clone()
    part = bank.subset([3, 1])
    stir(part, 0.5)
    bank.take_back(part)
    assert torch.allclose(bank.table()[[3, 1]], part.table(), rtol=1e-5, atol=0)
    assert all(
        torch.equal(mine, whole[[3, 1]])
        for mine, whole in zip(part.parameters(), bank.parameters(), strict=True)
    )
    assert torch.equal(bank.table()[[0, 2]], before[[0, 2]])


def test_a_subset_keeps_the_shape_of_its_generators():
    bank = make_bank(layers=3, width=5, encoding=6, dropout=0.3)
    part = bank.subset([2])
    assert [tuple(w.shape[1:]) for w in part.weights] == [tuple(w.shape[1:]) for w in bank.weights]
    assert part.options.dropout == 0.3


def test_a_subset_can_be_trained():
    bank = make_bank()
    part = bank.subset([2])
    with bank.time.at(torch.tensor([5, 6])):
        part.step_sizes().sum().backward()
    assert float(part.weights[0].grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in bank.parameters())


def test_raw_time_is_read_without_an_encoding():
    time = TimeContext(1000)
    (interval,), bank = TemporalIntervals(encoding=16, width=8, raw_time=True).make(["a"], time)
    assert torch.equal(bank.encodings[:, 0], torch.arange(1000) / 1000)
    assert bank.weights[0].shape[2] == 1 and interval.table().shape == (1000,)

    # A copy of a part reads the same.
    part = bank.subset([0])
    assert part.options.raw_time and torch.equal(part.table(), bank.table())


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_plain_start_leaves_the_networks_as_they_are(calibrated):
    options = {"encoding": 16, "width": 8, "calibrated": calibrated}
    (interval,), bank = TemporalIntervals(**options).make(["a"], TimeContext(100))
    before = interval.table().clone()
    interval.start(0.01)
    assert torch.equal(interval.table(), before) is not calibrated
