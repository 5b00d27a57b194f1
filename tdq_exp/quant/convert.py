"""Verbs on somebody else's network: quantize it, list what was done to it, bake it.

quantize(net, roles, recipe)     leaves replaced in place, quantizers in training form
layer_map(net, roles)            a printable row per leaf
bake(net)                        a copy, or itself, with integer weights and tables of intervals: what is sampled and shipped
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.quant import ops
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval, LookupTable
from tdq_exp.quant.intervals.dynamic import MaxAbs
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
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import SILU_MINIMUM, ReleaseDetails
from tdq_exp.quant.roles import Role
from tdq_exp.quant.rules.minmax import ChannelRange
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import LowerBound, TableZeroPoint, ZeroPoint

ZERO_POINTS = ("static", "lower_bound", "by_role")
WEIGHT_INTERVALS = ("static", "max_abs", "channel_range")


@dataclass(frozen=True)
class Recipe:
    """The four slots, filled.

    Args:
        weight_bits: b of weights.
        act_bits: b of activations.
        weight: class (or partial) of the weights' rule.
        act: class (or partial) of the activations' rule.
        intervals: gives activations their intervals: `StaticIntervals`, `PerStepIntervals`, `TemporalIntervals`.
        weight_interval: `static`; `max_abs` for rules whose weights follow their maximum; `channel_range` for affine
            weights that follow the range of each output channel.
        zero_point: `static` (a learned integer), `lower_bound` (z(t) = round(-beta / s(t))), or `by_role`: the second for
            inputs that come out of a SiLU and have a step size of t, the first for all others.
        plan: which layers, at how many bits.
        habits: text or release.
    """

    weight_bits: int
    act_bits: int
    weight: Callable[..., Quantizer]
    act: Callable[..., Quantizer]
    intervals: Any = field(default_factory=StaticIntervals)
    weight_interval: str = "static"
    zero_point: str = "by_role"
    plan: Plan = field(default_factory=Plan)
    habits: ReleaseDetails = field(default_factory=ReleaseDetails)

    def __post_init__(self) -> None:
        if self.zero_point not in ZERO_POINTS:
            raise ValueError(f"tdq.zero_point={self.zero_point!r}: choose one of {', '.join(ZERO_POINTS)}")
        if self.weight_interval not in WEIGHT_INTERVALS:
            raise ValueError(
                f"weight.interval={self.weight_interval!r}: weights do not change with time, so choose one of "
                + ", ".join(WEIGHT_INTERVALS)
            )
        Grid(self.weight_bits, symmetric=True, reduced=self.habits.reduced_grids)
        Grid(self.act_bits, symmetric=self.habits.symmetric_activations, reduced=self.habits.reduced_grids)


def quantize(net: nn.Module, roles: Mapping[str, Role], recipe: Recipe, steps: int) -> TimeContext:
    """Replaces leaves and attention processors in place; returns the network's time context.

    Args:
        net: a float network whose forward takes (x, t).
        roles: by leaf name, from the model.
        recipe: what to do.
        steps: T.

    Raises:
        ValueError: if a leaf has no role, or a role no leaf.
    """
    leaves = {name for name, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d | nn.Linear)}
    if leaves != roles.keys():
        raise ValueError(f"roles and layers differ: {sorted(leaves ^ roles.keys())[:3]}")
    time = TimeContext(steps)
    wanted = _activations(net, roles, recipe)
    names = list(wanted)
    intervals, bank = recipe.intervals.make(names, time, raw=recipe.habits.raw_step)
    acts = {
        name: _activation(recipe, wanted[name][0], wanted[name][1], interval)
        for name, interval in zip(names, intervals, strict=True)
    }
    for name, role in roles.items():
        bits = recipe.plan.bits(role, recipe.weight_bits, recipe.act_bits)
        if bits is not None:
            leaf = net.get_submodule(name)
            cls = QuantConv2d if isinstance(leaf, nn.Conv2d) else QuantLinear
            reads = acts.get(f"{name}.input")
            replace_module(net, name, cls(leaf, _weight(recipe, bits.weight), reads))
    for block in dict.fromkeys(role.block for role in roles.values() if role.kind == "attention_qkv"):
        inside = [acts.get(f"{block}.{part}") for part in ("input", "q", "k", "v", "probabilities")]
        if any(quantizer is not None for quantizer in inside):
            net.get_submodule(block).set_processor(QuantAttention(*inside))  # type: ignore[operator]
    if bank is not None:
        net.generators = bank
    time.follow(net)
    net.time = time  # type: ignore[assignment]
    return time


def _activations(net: nn.Module, roles: Mapping[str, Role], recipe: Recipe) -> dict[str, tuple[int, bool]]:
    """Name -> (bits, after SiLU?) of every activation quantizer, in the order of the network's modules."""
    wanted: dict[str, tuple[int, bool]] = {}
    for name, role in roles.items():
        bits = recipe.plan.bits(role, recipe.weight_bits, recipe.act_bits)
        if bits is not None:
            wanted.setdefault(role.reads or f"{name}.input", (bits.act, role.after_silu))
        if role.kind == "attention_qkv" and recipe.plan.attention:
            for part in ("q", "k", "v", "probabilities"):
                wanted.setdefault(f"{role.block}.{part}", (recipe.act_bits, False))
    return wanted


def _activation(recipe: Recipe, bits: int, after_silu: bool, interval: Interval) -> Quantizer:
    habits = recipe.habits
    symmetric = habits.symmetric_activations and not after_silu
    grid = Grid(bits, symmetric=symmetric, reduced=habits.reduced_grids)
    zero_point: nn.Module | None
    if symmetric or interval.dynamic:
        zero_point = None
    elif habits.symmetric_activations:
        zero_point = LowerBound(grid, SILU_MINIMUM, learned=False)
    elif recipe.zero_point == "lower_bound" or (recipe.zero_point == "by_role" and after_silu and interval.timed):
        zero_point = LowerBound(grid)
    else:
        zero_point = ZeroPoint(grid)
    return recipe.act(grid, interval, zero_point, scale_gradient=habits.scale_activation_gradient)


def _weight(recipe: Recipe, bits: int) -> Quantizer:
    by_channel = recipe.weight_interval == "channel_range"
    grid = Grid(bits, symmetric=not by_channel, reduced=recipe.habits.reduced_grids)
    interval: Interval
    if by_channel:
        interval = ChannelRange(grid)
    else:
        interval = Static(recipe.habits.raw_step) if recipe.weight_interval == "static" else MaxAbs(grid.p)
    quantizer = recipe.weight(grid, interval)
    quantizer.fixed = True
    return quantizer


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    owner = net.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(last)] = module
    else:
        setattr(owner, last, module)


def activation_quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """By module name, without the weights' ones."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Quantizer) and not name.endswith("weight_quantizer")
    }


@torch.no_grad()
def bake(net: nn.Module, inplace: bool = False) -> nn.Module:
    """A copy for inference: weights as integer codes, every interval and zero point a table. Same images, bit for bit.

    DoReFa's literal weights are not integers times a step: they stay float.

    Args:
        net: quantized, in training form.
        inplace: change the network itself, which saves the memory of a copy.
    """
    net = (net if inplace else copy.deepcopy(net)).eval().requires_grad_(False)
    time = net.time
    for module in net.modules():
        if isinstance(module, QuantLayer):  # one after another: never two forms of all weights
            _code(module)
            module.layer.register_parameter("weight", None)
    for quantizer in activation_quantizers(net).values():
        if quantizer.interval.dynamic:
            continue  # its ranges are those of its inputs
        s, z = quantizer.tables()
        quantizer.interval = LookupTable(s, time)  # type: ignore[arg-type]
        quantizer.zero_point = TableZeroPoint(z, time)
    if "generators" in dict(net.named_children()):
        del net.generators
    return net


@torch.no_grad()
def code_weights(net: nn.Module) -> None:
    """Replaces every weight quantizer by its codes, in place: from here on weights are constant."""
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
    coded = coded_weight(ops.quantize(weight, s, z, n, p), s, z, n, p)
    if not torch.equal(coded.dequantize(), quantizer(weight)):
        raise RuntimeError(f"{type(quantizer).__name__}: codes times step are not what the layer sees")
    return coded


def coded_weight(codes: Tensor, s: Tensor, z: Tensor, n: int, p: int) -> CodedWeight:
    """Codes n..p held as floats, in the form that is stored."""
    zero = None if n < 0 else z.clone()  # symmetric grids have none
    return CodedWeight(codes.to(smallest_integer_type(n, p)), s.clone(), zero)


def layer_map(net: nn.Module, roles: Mapping[str, Role]) -> list[dict[str, str]]:
    """What was done to every leaf: layer, role, weight and input codes, rule, interval and zero point."""
    rows = []
    for name, role in roles.items():
        layer = net.get_submodule(name)
        row = {"layer": name, "role": role.kind, "weight": "float", "input": "float"}
        if isinstance(layer, QuantLayer):
            row["weight"] = _describe(layer.weight_quantizer)
            shared = role.reads is not None
            row["input"] = f"shared: {role.reads}" if shared else _describe(layer.input_quantizer)
        rows.append(row)
    for name, module in net.named_modules():
        if isinstance(module, QuantAttention):
            block = name.removesuffix(".processor")
            for part in ("input", "q", "k", "v", "probabilities"):
                quantizer = module.input_quantizer if part == "input" else getattr(module, part)
                described = "float" if quantizer is None else _describe(quantizer)
                rows.append({"layer": f"{block}.{part}", "role": "attention_matrix", "weight": "-", "input": described})
    return rows


def _describe(quantizer: nn.Module | None) -> str:
    if isinstance(quantizer, CodedWeight):
        return f"codes {str(quantizer.codes.dtype).removeprefix('torch.')}"
    if isinstance(quantizer, FixedWeight):
        return "float, baked"
    assert isinstance(quantizer, Quantizer)
    zero = {ZeroPoint: ", learned z", LowerBound: ", z(t) from a lower bound", TableZeroPoint: ", z table"}
    offset = zero.get(type(quantizer.zero_point), "") if quantizer.zero_point is not None else ""  # type: ignore[arg-type]
    codes = f"{quantizer.grid.n}..{quantizer.grid.p}"
    return f"{type(quantizer).__name__} {codes}, {type(quantizer.interval).__name__}{offset}"
