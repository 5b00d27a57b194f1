"""What the first layer's quantizer cuts off the noise that sampling starts from.

An element of x_T beyond the quantizer's range is seen as smaller than it is, so less noise is
predicted than there is. The first step turns an error of eps into one of x_0 that is
sqrt((1 - abar) / abar) times as large (34 times for LDM's schedule in 50 steps, 130 times for
DDIM's), and where x_0 is not clipped, nothing takes it back: bright spots.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

from torch import nn

from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer
from tdq_exp.quant.roles import Role


def first_range(net: nn.Module, roles: Mapping[str, Role], t: int) -> tuple[float, float] | None:
    """Return the smallest and the largest x_t that the first layer sees as it is, at a time step.

    These are s (n - z) and s (p - z). None if no layer has this role, its input is not quantized,
    or it is by a range that follows the input.
    """
    name = next((name for name, role in roles.items() if role.kind == "first"), None)
    layer = None if name is None else net.get_submodule(name)
    quantizer = layer.input_quantizer if isinstance(layer, QuantLayer) else None
    tables = quantizer.tables() if isinstance(quantizer, Quantizer) else None
    if quantizer is None or tables is None:
        return None
    s, z = (float(table[t if len(table) > 1 else 0]) for table in tables)
    return s * (quantizer.grid.n - z), s * (quantizer.grid.p - z)


def noise_beyond(low: float, high: float) -> float:
    """Return the share of the elements of x_T, standard normal, outside of low..high."""
    noise = NormalDist()
    return noise.cdf(low) + noise.cdf(-high)
