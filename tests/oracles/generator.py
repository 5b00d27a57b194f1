"""One generator of step sizes by itself: `nn.Linear`s with ReLU between, softplus at the end, one time step at a time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode(t: int, width: int) -> list[float]:
    """enc(t): the cosines of d/2 frequencies `exp(-ln(10000) i / (d/2))`, then the sines."""
    angles = [t * math.exp(-math.log(10000.0) * i / (width / 2)) for i in range(width // 2)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def network(state: dict[str, Tensor], name: str, layers: int) -> nn.Sequential:
    """f of one quantizer, in double precision, from `<name>.<layer>.weight` and `.bias`."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        weight, bias = state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def step_size(f: nn.Sequential, t: int) -> Tensor:
    """s~(t) = softplus(f(enc(t))), 0-dim, with a graph to f's parameters."""
    code = torch.tensor(encode(t, f[0].in_features), dtype=torch.float64)
    return F.softplus(f(code)).squeeze()
