"""A rule of one's own, as README describes it: what it may change, and that nothing else slips through."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tdq_exp.quant import bake, parameter_groups, penalty, set_final_phase
from tdq_exp.quant.convert import Recipe, activation_quantizers
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.dynamic import DynamicIntervals
from tdq_exp.quant.intervals.static import Static
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer, check_rule
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.quant.rules.nipq import Nipq, NipqWeights
from tdq_exp.quant.rules.pact import Pact, PactWeights
from tests.quant.builders import INTERVALS, inputs, make_net, start_quickly


def power_of_two(s: Tensor) -> Tensor:
    """Return the nearest power of two in the logarithm, with the gradient of s."""
    return s + (torch.exp2(torch.log2(s).round()) - s).detach()


def is_power_of_two(s: Tensor) -> bool:
    mantissa, _ = torch.frexp(s)
    return bool((mantissa == 0.5).all())


class PowerOfTwo(Lsq):
    """Step sizes that a shift can multiply by."""

    def transform_step(self, s: Tensor) -> Tensor:
        return power_of_two(s)


class PowerOfTwoInRule(Lsq):
    """The same, where training alone would see it."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        return super().rule(x, power_of_two(s), z)


class StraightThrough(Lsq):
    """Another gradient, the same values up to rounding errors."""

    def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        return x + (super().rule(x, s, z) - x).detach()


def train(net: torch.nn.Module, updates: int = 3) -> None:
    x, t = inputs()
    groups = parameter_groups(net)
    rates = {"weights": 1e-3, "step_sizes": 1e-2, "zero_points": 1e-2, "generators": 1e-3}
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": rates[name]} for name, p in groups.items() if p]
    )
    net.train()
    for _ in range(updates):
        net(x, t).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("zero_point", ["static", "lower_bound"])
def test_every_step_of_a_power_of_two_rule_is_one_before_and_after_baking(interval, zero_point):
    recipe = Recipe(4, 4, PowerOfTwo, PowerOfTwo, INTERVALS[interval](), zero_point=zero_point)
    net = make_net(recipe, calibrated=False)
    start_quickly(net)
    train(net)

    steps: list[Tensor] = []
    for quantizer in (module for module in net.modules() if isinstance(module, Quantizer)):
        quantizer.register_forward_pre_hook(
            lambda module, args: steps.append(module.parameters_at(args[0].float())[0])
        )
    x, t = inputs()
    with torch.no_grad():
        expected = net(x, t).sample
    assert steps and all(is_power_of_two(s) for s in steps)

    baked = bake(net)
    for name, quantizer in activation_quantizers(baked).items():
        assert is_power_of_two(quantizer.tables()[0]), name
    layers = [module for module in baked.modules() if isinstance(module, QuantLayer)]
    assert layers and all(is_power_of_two(layer.weight_quantizer.step_size) for layer in layers)
    with torch.no_grad():
        assert torch.equal(baked(x, t).sample, expected)


def test_a_transformation_is_applied_once_even_if_twice_would_differ():
    class Doubled(Lsq):
        def transform_step(self, s: Tensor) -> Tensor:
            return 2 * s

    net = make_net(Recipe(4, 4, Doubled, Doubled), calibrated=False)
    start_quickly(net)
    x, t = inputs()
    with torch.no_grad():
        expected = net(x, t).sample
        baked = bake(net)
        assert torch.equal(baked(x, t).sample, expected)
        assert torch.equal(bake(baked)(x, t).sample, expected)


@pytest.mark.parametrize("where", ["weight", "act"])
def test_a_rule_that_changes_values_is_refused_before_anything_is_trained(where):
    rules = {"weight": Lsq, "act": Lsq, where: PowerOfTwoInRule}
    with pytest.raises(ValueError, match=r"PowerOfTwoInRule.rule changes values.*transform_step"):
        make_net(Recipe(4, 4, rules["weight"], rules["act"]), calibrated=False)


def test_a_rule_that_changes_values_of_some_steps_is_refused_when_it_is_baked():
    class Late(Lsq):
        def rule(self, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
            return super().rule(x, power_of_two(s) if float(s) > 1 else s, z)

    net = make_net(Recipe(4, 4, Lsq, Late), calibrated=False)
    start_quickly(net)
    for quantizer in activation_quantizers(net).values():
        quantizer.start(1.3, 0)
    with pytest.raises(ValueError, match="Late.rule changes values"):
        bake(net)


def test_a_rule_that_changes_gradients_alone_passes():
    make_net(Recipe(4, 4, StraightThrough, StraightThrough), calibrated=False)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("rule", [Lsq, Pact, PactWeights, Nipq, NipqWeights, MinMax, MinMaxWeights])
def test_every_rule_of_ours_passes_and_is_left_as_it_was(
    rule: Callable[..., Quantizer], bits, symmetric
):
    quantizer = rule(Grid(bits, symmetric=symmetric), Static())
    noisy, state = getattr(quantizer, "noisy", None), torch.get_rng_state()
    check_rule(quantizer)
    assert getattr(quantizer, "noisy", None) == noisy and quantizer.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transformed_step_and_a_range_that_is_read_from_the_input_are_refused_together():
    with pytest.raises(ValueError, match="PowerOfTwo transforms step sizes, which tdq=dynamic"):
        make_net(Recipe(4, 4, Lsq, PowerOfTwo, DynamicIntervals(True)), calibrated=False)


# --- Phases, penalties, groups


def test_the_final_phase_reaches_every_rule_that_has_two():
    net = make_net(Recipe(4, 4, NipqWeights, Nipq), calibrated=False)
    rules = [module for module in net.modules() if isinstance(module, Nipq)]
    assert rules and all(rule.noisy for rule in rules)
    set_final_phase(net, True)
    assert not any(rule.noisy for rule in rules)
    set_final_phase(net, False)
    assert all(rule.noisy for rule in rules)


def test_the_penalty_is_the_sum_over_the_rules_that_have_one():
    net = make_net(Recipe(4, 4, PactWeights, Pact, weight_interval="max_abs"), calibrated=False)
    start_quickly(net)
    expected = 0.0
    for quantizer in activation_quantizers(net).values():
        s = float(quantizer.tables()[0])
        expected += 2e-4 * (s * (quantizer.grid.p - quantizer.grid.n) / 2) ** 2
    assert float(penalty(net).detach()) == pytest.approx(expected, rel=1e-5)

    for quantizer in activation_quantizers(net).values():
        quantizer.decay = 0.0
    assert penalty(net) is None
    assert penalty(make_net(Recipe(4, 4, Lsq, Lsq), calibrated=False)) is None
    dynamic = Recipe(4, 4, PactWeights, Pact, DynamicIntervals(True), weight_interval="max_abs")
    assert penalty(make_net(dynamic, calibrated=False)) is None


@pytest.mark.parametrize("interval", INTERVALS)
def test_every_parameter_is_in_the_group_that_its_name_says(interval):
    net = make_net(
        Recipe(4, 4, Lsq, Lsq, INTERVALS[interval](), zero_point="by_role"), calibrated=False
    )
    groups = parameter_groups(net)
    found = {id(p): group for group, parameters in groups.items() for p in parameters}
    assert sum(map(len, groups.values())) == len(found) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        group = {"rho": "step_sizes", "beta": "step_sizes", "zeta": "zero_points"}.get(
            name.rpartition(".")[2], "weights"
        )
        if name.startswith("generators."):
            group = "generators"
        assert found[id(parameter)] == group, name
