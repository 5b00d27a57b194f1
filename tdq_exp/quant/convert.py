"""Verbs on somebody else's network: quantize it, list what was done to it, bake it.

quantize(net, roles, recipe, steps)   leaves replaced in place, quantizers in training form
layer_map(net, roles)                 a printable row for each leaf
bake(net)                             integer weights, step sizes as tables: what is shipped
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.float32 import keep_in_float32
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Bank, Interval, Intervals, LookupTable
from tdq_exp.quant.intervals.dynamic import ChannelRange, MaxAbs
from tdq_exp.quant.intervals.static import Static, StaticIntervals
from tdq_exp.quant.layers import (
    CodedWeight,
    FixedWeight,
    QuantAttention,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    smallest_integer_type,
)
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.quantizer import Quantizer, check_rule
from tdq_exp.quant.release import SILU_MINIMUM, ReleaseDetails
from tdq_exp.quant.roles import Role
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import LowerBound, TableZeroPoint, ZeroPoint, ZeroPointSource

ZERO_POINTS = ("static", "lower_bound", "by_role")
WEIGHT_INTERVALS = ("static", "max_abs", "channel_range")
ATTENTION_INPUT = "attention_input"  # role of the quantizer that q, k and v read from together
ATTENTION_PARTS = ("input", "q", "k", "v", "probabilities")


@dataclass(frozen=True)
class Recipe:
    """How a network is quantized: what fills the slots of its quantizers.

    Args:
        weight_bits: b of weights.
        act_bits: b of activations.
        weight: class (or partial) of the weights' rule.
        act: class (or partial) of the activations' rule.
        intervals: gives activations their intervals: `StaticIntervals`, `PerStepIntervals`,
            `TemporalIntervals`, `DynamicIntervals`, or another subclass of `Intervals`.
        weight_interval: `static`; `max_abs` for rules whose weights follow their maximum;
            `channel_range` for affine weights that follow the range of each output channel.
        zero_point: of activations: `static` (a learned integer), `lower_bound` (z(t) = round(-beta
            / s(t))), or `by_role`: the second for inputs that come out of a SiLU and have a step
            size that depends on t, the first for all others.
        plan: which layers, at how many bits.
        habits: the paper's text or its released code.
    """

    weight_bits: int
    act_bits: int
    weight: Callable[..., Quantizer]
    act: Callable[..., Quantizer]
    intervals: Intervals = field(default_factory=StaticIntervals)
    weight_interval: str = "static"
    zero_point: str = "by_role"
    plan: Plan = field(default_factory=Plan)
    habits: ReleaseDetails = field(default_factory=ReleaseDetails)

    def __post_init__(self) -> None:
        if self.zero_point not in ZERO_POINTS:
            choices = ", ".join(ZERO_POINTS)
            raise ValueError(f"tdq.zero_point={self.zero_point!r}: choose one of {choices}")
        if self.weight_interval not in WEIGHT_INTERVALS:
            raise ValueError(
                f"weight.interval={self.weight_interval!r}: weights do not change with time, so"
                f" choose one of {', '.join(WEIGHT_INTERVALS)}"
            )

        # The grids refuse numbers of bits that they do not have.
        Grid(self.weight_bits, symmetric=True, reduced=self.habits.reduced_grids)
        Grid(
            self.act_bits,
            symmetric=self.habits.symmetric_activations,
            reduced=self.habits.reduced_grids,
        )


class AttentionWrapper(Protocol):
    """Makes a network's attention block use quantizers; the model's description has one."""

    def __call__(self, block: nn.Module, quantizers: Sequence[Quantizer | None]) -> None:
        """Give a block, in place, quantizers of its input, q, k, v and the softmax output."""


@dataclass(frozen=True)
class Wanted:
    """What one activation quantizer is for: its bits, and whether its input comes out of a SiLU."""

    bits: int
    after_silu: bool = False


def quantize(
    net: nn.Module,
    roles: Mapping[str, Role],
    recipe: Recipe,
    steps: int,
    attention: AttentionWrapper | None = None,
) -> TimeContext:
    """Replace the leaves of a network in place; return the network's time context.

    Args:
        net: a float network whose forward takes (x, t). Its forward sets the time context from now
            on.
        roles: by leaf name, from the model.
        recipe: what to do.
        steps: T.
        attention: puts quantizers into an attention block; for networks that have any.

    Raises:
        ValueError: if a leaf has no role, or a role no leaf; if a rule of the recipe changes
            values.
    """
    leaves = {n for n, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d | nn.Linear)}
    if leaves != roles.keys():
        raise ValueError(f"roles and layers differ: {sorted(leaves ^ roles.keys())[:3]}")

    time = TimeContext(steps)

    # Activation quantizers, each with an interval of its own.
    wanted = _activations(roles, recipe)
    intervals, bank = recipe.intervals.make(list(wanted), time, raw=recipe.habits.raw_step)
    acts = {
        name: _activation(recipe, wanted[name], interval)
        for name, interval in zip(wanted, intervals, strict=True)
    }

    # Leaves, with their weight quantizers.
    for name, role in roles.items():
        bits = recipe.plan.bits(role, recipe.weight_bits, recipe.act_bits)
        if bits is not None:
            leaf = net.get_submodule(name)
            cls = QuantConv2d if isinstance(leaf, nn.Conv2d) else QuantLinear
            layer = cls(leaf, _weight(recipe, bits.weight), acts.get(f"{name}.input"))
            replace_module(net, name, layer)

    # Attention blocks.
    blocks = (role.block for role in roles.values() if role.kind == "attention_qkv")
    for block in dict.fromkeys(blocks):
        inside = [acts.get(f"{block}.{part}") for part in ATTENTION_PARTS]
        if any(quantizer is not None for quantizer in inside):
            if attention is None:
                raise ValueError(f"{block}: hand `quantize` the model's `attention` wrapper")
            attention(net.get_submodule(block), inside)

    keep_in_float32(net)
    time.follow(net)
    if bank is not None:
        net.generators = bank
        net.register_forward_pre_hook(_draw_first)

    net.time = time  # type: ignore[assignment]

    _check_rules(net)
    return time


def _draw_first(net: nn.Module, args: object) -> None:
    """Let a bank that draws random numbers do so before all blocks: a hook of the forward pass.

    A block that is computed again draws what it drew before, and the bank's would be among it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    bank = net._modules.get("generators")  # a baked network has none
    if isinstance(bank, Bank) and bank.draws:
        bank.prepare(compiled=False)


def _check_rules(net: nn.Module) -> None:
    """Check each kind of rule on each of its grids once, before anything is trained."""
    different = {
        (type(module), module.grid): module
        for module in net.modules()
        if isinstance(module, Quantizer)
    }
    for quantizer in different.values():
        check_rule(quantizer)


def _activations(roles: Mapping[str, Role], recipe: Recipe) -> dict[str, Wanted]:
    """Return every activation quantizer by name, in the order of the network's modules."""
    wanted: dict[str, Wanted] = {}
    for name, role in roles.items():
        bits = recipe.plan.bits(role, recipe.weight_bits, recipe.act_bits)
        if bits is not None:
            wanted.setdefault(role.reads or f"{name}.input", Wanted(bits.act, role.after_silu))
        if role.kind == "attention_qkv" and recipe.plan.attention:
            for part in ATTENTION_PARTS[1:]:
                wanted.setdefault(f"{role.block}.{part}", Wanted(recipe.act_bits))
    return wanted


def _activation(recipe: Recipe, wanted: Wanted, interval: Interval) -> Quantizer:
    habits = recipe.habits
    symmetric = habits.symmetric_activations and not wanted.after_silu
    grid = Grid(wanted.bits, symmetric=symmetric, reduced=habits.reduced_grids)

    # The zero point: learned, bounded below, or none.
    bounded = recipe.zero_point == "lower_bound"
    if recipe.zero_point == "by_role":
        bounded = wanted.after_silu and interval.time_dependent

    zero_point: ZeroPointSource | None
    if symmetric or interval.dynamic:
        zero_point = None
    elif habits.symmetric_activations:
        zero_point = LowerBound(grid, SILU_MINIMUM, learned=False)
    else:
        zero_point = LowerBound(grid) if bounded else ZeroPoint(grid)

    scale = habits.scale_activation_gradient
    quantizer = recipe.act(grid, interval, zero_point, gradient_scale=scale)

    if interval.dynamic and quantizer.transforms_step:
        raise ValueError(
            f"act: {type(quantizer).__name__} transforms step sizes, which tdq=dynamic takes from"
            " the range of each input as they are: choose another tdq"
        )
    return quantizer


def _weight(recipe: Recipe, bits: int) -> Quantizer:
    interval: Interval
    if recipe.weight_interval == "static":
        interval = Static(recipe.habits.raw_step)
    else:
        interval = MaxAbs() if recipe.weight_interval == "max_abs" else ChannelRange()

    symmetric = recipe.weight_interval != "channel_range"
    grid = Grid(bits, symmetric=symmetric, reduced=recipe.habits.reduced_grids)
    quantizer = recipe.weight(grid, interval)
    quantizer.fixed = True
    return quantizer


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    owner = net.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)


def activation_quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of activations by module name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Quantizer) and not name.endswith("weight_quantizer")
    }


@torch.no_grad()
def bake(net: nn.Module, inplace: bool = False) -> nn.Module:
    """Return a copy for inference: weights as codes, every step size and zero point a table.

    It gives the same images, bit for bit. DoReFa's literal weights are not integers times a step:
    they stay float. Where s is read from the input there is no table.

    Args:
        net: quantized, in training form.
        inplace: change the network itself, which saves the memory of a copy.

    Raises:
        ValueError: if a rule computes other values in its final phase than inference does.
    """
    net = (net if inplace else copy.deepcopy(net)).eval().requires_grad_(False)
    time = net.time

    # Weights become codes.
    for module in net.modules():
        if isinstance(module, QuantLayer):  # one after another: never two forms of all weights
            _code(module)
            module.layer.register_parameter("weight", None)

    # Step sizes and zero points become tables.
    for quantizer in activation_quantizers(net).values():
        tables = quantizer.tables()
        if tables is not None:
            s, z = tables
            check_rule(quantizer, s[0], z[0])
            quantizer.interval = LookupTable(s, time)  # type: ignore[arg-type]
            quantizer.zero_point = TableZeroPoint(z, time)  # type: ignore[arg-type]

    if "generators" in dict(net.named_children()):
        del net.generators

    return net


@torch.no_grad()
def code_weights(net: nn.Module) -> None:
    """Replace every weight quantizer by its codes, in place: from here on weights are constant."""
    for module in net.modules():
        if isinstance(module, QuantLayer):
            _code(module)


def _code(layer: QuantLayer) -> None:
    quantizer, weight = layer.weight_quantizer, layer.layer.weight
    if isinstance(quantizer, Quantizer):
        assert isinstance(weight, Tensor)
        layer.weight_quantizer = _coded(quantizer, weight)


def _coded(quantizer: Quantizer, weight: Tensor) -> CodedWeight | FixedWeight:
    if not quantizer.integer:
        return FixedWeight(quantizer(weight))
    n, p = quantizer.grid.n, quantizer.grid.p
    s, z = quantizer.parameters_at(weight)
    coded = coded_weight(ops.to_codes(weight, s, z, n, p), s, z, n, p)
    if not torch.equal(coded.dequantize(), quantizer(weight)):
        raise RuntimeError(
            f"{type(quantizer).__name__}: codes times step are not what the layer sees"
        )
    return coded


def coded_weight(codes: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> CodedWeight:
    """Return codes n..p, held as floats, in the form that is stored."""
    zero = None if n < 0 else z.clone()  # symmetric grids have none
    return CodedWeight(codes.to(smallest_integer_type(n, p)), s.clone(), zero)


def layer_map(net: nn.Module, roles: Mapping[str, Role]) -> list[dict[str, str]]:
    """Return what was done to every leaf and attention matrix: a row of texts for each.

    Returns:
        `layer`, `role`, `weight` and `input`: codes, rule, interval and zero point, or "float".
    """
    rows = []

    # The leaves.
    for name, role in roles.items():
        layer = net.get_submodule(name)
        row = {"layer": name, "role": role.kind, "weight": "float", "input": "float"}
        if isinstance(layer, QuantLayer):
            row["weight"] = _describe(layer.weight_quantizer)
            shared = role.reads is not None
            row["input"] = f"shared: {role.reads}" if shared else _describe(layer.input_quantizer)
        rows.append(row)

    # The factors of the attention products.
    for name, module in net.named_modules():
        if isinstance(module, QuantAttention):
            block = name.rpartition(".")[0]
            inside = (module.input_quantizer, module.q, module.k, module.v, module.probabilities)
            for part, quantizer in zip(ATTENTION_PARTS, inside, strict=True):
                described = "float" if quantizer is None else _describe(quantizer)
                kind = ATTENTION_INPUT if part == "input" else "attention_matrix"
                row = {"layer": f"{block}.{part}", "role": kind, "weight": "-"}
                rows.append(row | {"input": described})

    return rows


def attention_role(quantizer: str) -> str:
    """Return the role of a quantizer inside of an attention, which no layer has, by its name."""
    return ATTENTION_INPUT if quantizer.endswith("input_quantizer") else "attention_matrix"


def _describe(quantizer: nn.Module | None) -> str:
    if isinstance(quantizer, CodedWeight):
        return f"codes {str(quantizer.codes.dtype).removeprefix('torch.')}"
    if isinstance(quantizer, FixedWeight):
        return "float, baked"
    assert isinstance(quantizer, Quantizer)
    rule, interval = type(quantizer).__name__, type(quantizer.interval).__name__
    zero_point = "" if quantizer.zero_point is None else f", {quantizer.zero_point.description}"
    return f"{rule} {quantizer.grid.n}..{quantizer.grid.p}, {interval}{zero_point}"
