"""What the activation quantizers of a network do over t (Figures 3 and 9, and the layers' map).

The network is shown x_t of the float network's own sampling, and every quantizer is watched:

    truncation = sum over x beyond the grid of (x - x_hat)^2 / sum x^2
    rounding   = sum over x within the grid of (x - x_hat)^2 / sum x^2
    SQNR       = 10 log10(sum y^2 / sum (y_hat - y)^2)          decibels

y is the output of a layer whose input is not quantized, y_hat that of the same layer as it is, both
with the layer's quantized weight. A matrix inside of attention has no layer: there y is the matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.analysis.trajectory import Note, Trajectory, rounded, watching
from tdq_exp.experiment.build import Experiment
from tdq_exp.quant.convert import activation_quantizers, attention_role
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.quantizer import Quantizer

EDGES = (0.01, 0.99)  # quantiles that a range is shown by, beside minimum and maximum
KEPT = 100_000  # values of a tensor that quantiles are taken of
CEILING = 99.0  # decibels, where there is no error at all
INPUT = ".input_quantizer"

COLUMNS = ("low", "q01", "q99", "high", "grid_low", "grid_high", "truncation", "rounding")


@torch.no_grad()
def measure(job: Experiment, net: nn.Module, trajectory: Trajectory) -> dict[str, Any]:
    """Watch every activation quantizer of a network.

    Args:
        job: of the network.
        net: quantized and baked.
        trajectory: what it is shown.

    Returns:
        `t`; and `quantizers`, in the order of the network: name -> each of `COLUMNS` and `sqnr`
        over t, `bits` of the codes, and the `role` of the layer that reads it.
    """
    quantizers = activation_quantizers(net)
    seen: dict[str, list[list[float]]] = defaultdict(list)
    noise: dict[str, list[float]] = defaultdict(list)

    def note(name: str) -> Note:
        def keep(module: nn.Module, x: Tensor, x_hat: Tensor) -> None:
            assert isinstance(module, Quantizer)
            if module.observer is None:
                seen[name].append(_numbers(module, x, x_hat))
                if not name.endswith(INPUT):
                    noise[name].append(sqnr(x, x_hat))

        return keep

    def note_layer(name: str) -> Note:
        def keep(layer: nn.Module, x: Tensor, y_hat: Tensor) -> None:
            assert isinstance(layer, QuantLayer) and layer.input_quantizer is not None
            with switched_off(layer.input_quantizer):
                noise[f"{name}{INPUT}"].append(sqnr(layer.forward(x), y_hat))

        return keep

    layers = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, QuantLayer) and layer.input_quantizer is not None
    }
    with watching(dict(quantizers), note), watching(dict(layers), note_layer):
        for t, x in trajectory:
            job.model.predict(net, x, torch.tensor(t))

    with torch.device("meta"):  # names are all that is wanted
        roles = job.model.roles(job.model.build())

    # An attention's own input quantizer has no layer of its own: its tensor's noise counts.
    found = {}
    for name, rows in seen.items():
        role = roles.get(name.removesuffix(INPUT))
        by_column = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        bits = (quantizers[name].grid.p - quantizers[name].grid.n).bit_length()
        found[name.removesuffix("_quantizer")] = {
            **by_column,
            "sqnr": noise[name] or [sqnr_of(row) for row in rows],
            "bits": bits,
            "role": attention_role(name) if role is None else role.kind,
        }
    return {"t": trajectory.t, "quantizers": rounded(found)}


def _numbers(quantizer: Quantizer, x: Tensor, x_hat: Tensor) -> list[float]:
    """Return `COLUMNS` of one tensor."""
    s, z = quantizer.parameters_at(x)
    n, p = quantizer.grid.n, quantizer.grid.p

    # What rounds to a code within the grid is rounded; what does not is truncated.
    error = (x - x_hat).square()
    codes = (x / s).round() + z
    beyond = (codes < n) | (codes > p)
    power = float(x.square().sum()) or 1.0

    values = x.flatten()
    values = values[:: -(-len(values) // KEPT)]
    edges = torch.quantile(values, torch.tensor(EDGES)).tolist()
    return [
        float(x.min()),
        *edges,
        float(x.max()),
        float((s * (n - z)).min()),
        float((s * (p - z)).max()),
        float(error[beyond].sum()) / power,
        float(error[~beyond].sum()) / power,
    ]


def sqnr(y: Tensor, y_hat: Tensor) -> float:
    """Return 10 log10(sum y^2 / sum (y_hat - y)^2), decibels, at most `CEILING`."""
    signal, noise = y.square().sum(), (y_hat - y).square().sum()
    return min(float(10 * torch.log10(signal / noise)), CEILING)


def sqnr_of(row: list[float]) -> float:
    """Return the same of a tensor whose relative truncation and rounding error are known."""
    noise = sum(row[-2:])
    return min(float(-10 * torch.log10(torch.tensor(noise))), CEILING)


@contextmanager
def switched_off(*quantizers: Quantizer) -> Iterator[None]:
    """Let quantizers pass on what they get."""
    for quantizer in quantizers:
        quantizer.observer = _ignore
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _ignore(x: Tensor) -> None:
    """Take no note: a quantizer that has an observer quantizes nothing."""
