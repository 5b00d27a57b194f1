"""Quantizers: grid, step size, zero point, rule and plan. Plain torch: nothing of diffusion.

| slot       | contract                               | files |
|------------|----------------------------------------|-------|
| grid       | codes n..p                             | grid |
| step size  | interval(x, grid) -> (s, z or None)    | intervals: static, temporal (TDQ), dynamic |
| zero point | zero_point(s) -> z                     | zero_point |
| rule       | rule(x, s, z) -> x_hat, with gradients | quantizer, rules: lsq, pact, nipq, minmax |
| plan       | bits(role) -> bits, or float           | plan, roles |

The names below are the package's face: configurations and records use them, so that files can move.
"""

from tdq_exp.quant.calibrate import calibrating
from tdq_exp.quant.convert import Recipe, bake, layer_map, quantize
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import Bank, Interval, Intervals, LookupTable
from tdq_exp.quant.intervals.dynamic import Dynamic, DynamicIntervals
from tdq_exp.quant.intervals.static import PerStep, PerStepIntervals, Static, StaticIntervals
from tdq_exp.quant.intervals.temporal import Temporal, TemporalIntervals
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.release import ReleaseDetails
from tdq_exp.quant.roles import Role
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.quant.rules.nipq import Nipq, NipqWeights
from tdq_exp.quant.rules.pact import DorefaWeights, Pact, PactWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.training import initialize, parameter_groups, penalty, set_final_phase
from tdq_exp.quant.zero_point import LowerBound, ZeroPoint

__all__ = [
    "Bank",
    "DorefaWeights",
    "Dynamic",
    "DynamicIntervals",
    "Grid",
    "Interval",
    "Intervals",
    "LookupTable",
    "LowerBound",
    "Lsq",
    "MinMax",
    "MinMaxWeights",
    "Nipq",
    "NipqWeights",
    "Pact",
    "PactWeights",
    "PerStep",
    "PerStepIntervals",
    "Plan",
    "Quantizer",
    "Recipe",
    "ReleaseDetails",
    "Role",
    "Static",
    "StaticIntervals",
    "Temporal",
    "TemporalIntervals",
    "TimeContext",
    "ZeroPoint",
    "bake",
    "calibrating",
    "initialize",
    "layer_map",
    "parameter_groups",
    "penalty",
    "quantize",
    "set_final_phase",
]
