"""What the tests of this folder are parametrised by: rules, grids, intervals, and a network of a few thousand weights."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant import calibrate
from tdq_exp.quant.convert import Recipe, activation_quantizers
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Interval
from tdq_exp.quant.intervals.static import PerStepIntervals, StaticIntervals
from tdq_exp.quant.intervals.temporal import GeneratorBank, TemporalIntervals
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.nipq import Nipq, NipqWeights
from tdq_exp.quant.rules.pact import Pact, PactWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 1000
BITS = (2, 3, 4, 8, 16)
RULES: dict[str, type[Quantizer]] = {
    "lsq": Lsq, "pact": Pact, "pact_weights": PactWeights, "nipq": Nipq, "nipq_weights": NipqWeights,
}  # fmt: skip
GRIDS = (
    "symmetric",
    "affine",
    "lower_bound",
)  # the last one is affine too, with z(t) = round(-beta / s(t))
INTERVALS: dict[str, Callable[[], Any]] = {
    "static": StaticIntervals,
    "per_step": lambda: PerStepIntervals(10),
    "temporal": lambda: TemporalIntervals(encoding=16, width=8),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stir(module: nn.Module, spread: float, seed: int = 0) -> None:
    """Moves every parameter away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += spread * torch.randn(parameter.shape, generator=generator)


def make_interval(kind: str, time: TimeContext) -> tuple[Interval, GeneratorBank | None]:
    """One interval by itself, and its bank if it has one."""
    torch.manual_seed(0)
    (interval,), bank = INTERVALS[kind]().make(["only"], time)
    return interval, bank


def make_quantizer(
    rule: str, bits: int, grid: str, interval: str, s: float = 0.1, **options: Any
) -> tuple[Quantizer, TimeContext, GeneratorBank | None]:
    """A quantizer away from its start values, rounding for real, while training.

    s is the largest step size, roughly: 16 bits of it reach further than 2 bits.
    """
    time = TimeContext(STEPS)
    source, bank = make_interval(interval, time)
    codes = Grid(bits, symmetric=grid == "symmetric")
    zero = {
        "symmetric": lambda: None,
        "affine": lambda: ZeroPoint(codes),
        "lower_bound": lambda: LowerBound(codes),
    }
    quantizer = RULES[rule](codes, source, zero[grid](), **options)
    quantizer.start(s, round(0.4 * codes.p))
    stir(source if bank is None else bank, 0.05)
    if isinstance(quantizer, Nipq):
        quantizer.noisy = False  # the final phase
    return quantizer.train(), time, bank


@lru_cache
def _definition(name: str) -> Any:
    return OmegaConf.to_container(
        OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").model.definition
    )


def load_model(name: str, **network: Any) -> DiffusionModel:
    """A model of `configs/model`, its network changed if asked for."""
    definition = _definition(name)
    schedule = {key: value for key, value in definition["schedule"].items() if key != "_target_"}
    return DiffusionModel({**definition["network"], **network}, Schedule(**schedule))


def inputs(batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x_t, t) for the tiny network, t spread over all of time."""
    return randn(batch, 1, 8, 8, seed=seed), torch.linspace(0, STEPS - 1, batch).long()


# For `make_net`: one level and no block in the middle, as blocks of one kind are alike, and where each
# of them takes a second.
ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
}


def make_net(
    recipe: Recipe,
    calibrated: bool = True,
    model: str = "tiny",
    few: int = 512,
    **network: Any,
) -> nn.Module:
    """A quantized network in eval mode, on a few values of a few calibration samples if asked for.

    With all values that a fit takes, the search for start values takes longer than what most tests
    do with the network; those that want start values as good as a fit's set `few`.
    """
    made = load_model(model, **network)
    net = made.build()
    torch.manual_seed(0)
    made.quantize(net, recipe)
    net.eval()
    if calibrated:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibrate, "KEPT", few)
            with calibrate.calibrating(net, 1, recipe.habits.start), torch.no_grad():
                net(*inputs(8))
    return net


def start_quickly(net: nn.Module) -> None:
    """Start values without a search: weights by their maximum, activations by a step that differs from one to the next."""
    for module in net.modules():
        if isinstance(module, QuantLayer):
            module.weight_quantizer.start(
                float(module.layer.weight.detach().abs().max()) / module.weight_quantizer.grid.p, 0
            )
    for number, quantizer in enumerate(activation_quantizers(net).values()):
        reach = 4.0 + 0.05 * number
        codes = quantizer.grid
        quantizer.start(reach / codes.p, 0 if codes.symmetric else round(0.3 * codes.p))


def make_recipe(
    rule: str = "lsq", interval: str = "static", bits: int = 4, **options: Any
) -> Recipe:
    """Weights and activations by one method."""
    weight = {"lsq": Lsq, "pact": PactWeights, "nipq": NipqWeights}[rule]
    options.setdefault("weight_interval", "max_abs" if rule == "pact" else "static")
    return Recipe(bits, bits, weight, RULES[rule], INTERVALS[interval](), **options)
