"""What quantization-aware training and post-training quantization share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdq_exp.fit import correction
from tdq_exp.fit.calibrated import Batches, calibrated
from tdq_exp.fit.fit import Fit, Subject
from tdq_exp.fit.options import BAKED, FitOptions
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.weights.fill import load_weights
from tdq_exp.quant import initialize
from tdq_exp.quant.convert import Recipe, activation_quantizers, bake, layer_map
from tdq_exp.runtime import files
from tdq_exp.runtime.context import RunContext

SEARCH_VERSION = 3  # of the search for start values

O_co = TypeVar("O_co", bound=FitOptions, covariant=True)


class QuantizedFit(Fit[O_co]):
    """A fit that starts from a float network and gives a quantized one."""

    def parts(self, subject: Subject, seed: int) -> dict[str, Any]:
        return super().parts(subject, seed) | subject.quantizers()

    def calibrate(
        self,
        net: nn.Module,
        subject: Subject,
        batches: Batches,
        seen: dict[str, Any],
        context: RunContext,
    ) -> nn.Module:
        """Quantize a network in place, set its start values, and write the map of its layers.

        Args:
            net: float, on the device.
            subject: what the fit works on.
            batches: what the network is shown.
            seen: what the batches depend on, for the cache of start values.
            context: of the run.
        """
        key = {
            "version": SEARCH_VERSION,
            "weights": subject.weights,
            **seen,
            "seed": context.seed,
            **subject.groups,
            **subject.model.parts(),
        }
        recipe = required(subject.recipe)
        net = calibrated(net, subject.model, recipe, batches, context, key)

        context.processes.decide(lambda: _write_layer_map(context, subject.model, net))
        return net

    def network_file(self, folder: Path) -> Path:
        return folder / BAKED

    def finished(
        self, model: DiffusionModel, recipe: Recipe | None, folder: Path, device: torch.device
    ) -> nn.Module:
        net = bake(self.skeleton(model, recipe), inplace=True)
        load_weights(net, str(self.network_file(folder)))
        return net.to(device)

    def skeleton(self, model: DiffusionModel, recipe: Recipe | None) -> nn.Module:
        net = skeleton(model, required(recipe))
        if self.options.corrects:
            correction.attach(net, model)
        return net


def required(recipe: Recipe | None) -> Recipe:
    """Return the recipe of a quantized network.

    Raises:
        ValueError: if there is none.
    """
    if recipe is None:
        raise ValueError("method.quantized=false: this fit needs quantizers")
    return recipe


def skeleton(model: DiffusionModel, recipe: Recipe) -> nn.Module:
    """Return the quantized network before calibration: the right modules, any numbers."""
    net = model.build()
    model.quantize(net, recipe)
    initialize(net)
    return net.eval()


def interval_tables(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (s, z) over t of every activation quantizer, by name, on the CPU.

    Each is `[T]`, or `[1]` where it does not depend on t; those that are read from the input are
    left out.
    """
    tables = {name: q.tables() for name, q in activation_quantizers(net).items()}
    return {name: (s.cpu(), z.cpu()) for name, (s, z) in _filled(tables)}


def _filled(
    tables: Mapping[str, tuple[Tensor, Tensor] | None],
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name, table in tables.items():
        if table is not None:
            yield name, table


def _write_layer_map(context: RunContext, model: DiffusionModel, net: nn.Module) -> None:
    with torch.device("meta"):  # names are all that is wanted
        roles = model.roles(model.build())

    rows = layer_map(net, roles)
    quantized = sum(row["weight"] not in ("float", "-") for row in rows)
    leaves = sum(row["weight"] != "-" for row in rows)
    counts = {"quantized_leaves": quantized, "leaves": leaves}
    files.write_json(
        context.folder / "layers.json",
        {"fit": context.fingerprint, **counts, **layer_record(rows)},
    )


def layer_record(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Any]]:
    """Return a layer map as it is recorded: most layers are one of a few kinds.

    Args:
        rows: of `layer_map`.

    Returns:
        kinds: what a layer is besides its name, each once.
        layers: (name, index of its kind), in the order of the network.
    """
    kinds: list[dict[str, str]] = []
    layers: list[tuple[str, int]] = []
    for row in rows:
        kind = {key: value for key, value in row.items() if key != "layer"}
        if kind not in kinds:
            kinds.append(kind)
        layers.append((row["layer"], kinds.index(kind)))

    return {"kinds": kinds, "layers": [list(layer) for layer in layers]}
