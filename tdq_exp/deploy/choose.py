"""Which layers run on codes: each kind and shape of layer is timed both ways at load time.

Small layers can be slower on codes, where quantizing the input and calling the kernel cost more
than the product saves. The choice changes the last bits of an image, so a sampled set keeps the
choice that it was begun with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.deploy.coders import coder_of
from tdq_exp.deploy.integer import IntegerLayer, candidates, readers
from tdq_exp.quant.layers import QuantAttention, QuantLayer
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import print_table

ROUNDS = 7


@dataclass(frozen=True)
class Timed:
    """One shape of layer.

    Args:
        names: of the layers that share it.
        shape: what they are, to print.
        simulated, integer: median seconds of a call.
    """

    names: tuple[str, ...]
    shape: str
    simulated: float
    integer: float

    @property
    def speedup(self) -> float:
        return self.simulated / self.integer


@dataclass(frozen=True)
class Kept:
    """Where a choice is kept.

    Args:
        file: beside the images that are made with it.
        sample: fingerprint of these images; empty where no row is made of them.
        begun: whether some of them are there already.
    """

    file: Path
    sample: str = ""
    begun: bool = False

    @property
    def again(self) -> str:
        images = self.file.parent / "images"
        return f"put the right one back, or remove {images} and what is there of it to begin again"


@torch.no_grad()
def timed(net: nn.Module, run: Callable[[nn.Module], object]) -> list[Timed]:
    """Time every candidate on the input that it gets in a run of the network, one of each shape.

    Args:
        net: baked, in eval mode.
        run: a forward pass at the batch size and time step of interest.
    """
    found = candidates(net)
    units = _units(net, found)
    seen: dict[str, Tensor] = {}

    # The first input of each unit, kept in one run of the network.
    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()

        return hook

    handles = []
    for names, reader in units:
        source = reader if reader is not None else net.get_submodule(names[0])
        handles.append(source.register_forward_pre_hook(keep(names[0])))

    run(net)
    for handle in handles:
        handle.remove()

    # Units of one shape take the same time: the first stands for all.
    shapes: dict[str, list[tuple[str, ...]]] = {}
    readers = dict(units)
    for names, _ in units:
        if names[0] in seen:
            shapes.setdefault(_shape(net, names, seen[names[0]]), []).append(names)

    result = []
    for shape, same in shapes.items():
        names = same[0]
        x, reader = seen[names[0]], readers[names]
        layers = [net.get_submodule(name) for name in names]
        coded = [found[name] for name in names]

        # Each form gets the layout that it runs on: channels last for codes.
        last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        coder = coder_of(reader) if reader is not None else None

        both = {
            "simulated": partial(_call, layers, reader, x),
            "integer": partial(_call, coded, coder, last),
        }

        seconds = _medians(both)
        result.append(
            Timed(
                tuple(n for names in same for n in names),
                shape,
                seconds["simulated"],
                seconds["integer"],
            )
        )

    return result


def chosen(times: list[Timed], min_speedup: float) -> list[str]:
    """Names of the layers whose shape gains at least so much."""
    return [name for entry in times if entry.speedup >= min_speedup for name in entry.names]


def choice(
    net: nn.Module,
    run: Callable[[nn.Module], object],
    min_speedup: float,
    kept: Kept,
) -> dict[str, Any]:
    """Return which layers run on codes: from the file of an earlier choice, or measured anew.

    Args:
        net: baked, in eval mode.
        run: see `timed`.
        min_speedup: least gain of a layer; 0 takes every layer that can.
        kept: where the choice is kept, and for which images.

    Returns:
        `layers`: their names; `of`: how many quantized layers there are; `shapes`: what was
            measured; `sample`.

    Raises:
        ValueError: if the file is damaged, of other images or another network, or missing where
            images were begun with it.
    """
    found = files.read_json(kept.file, needs=["layers", "of"])
    if found is not None:
        _require_choice(kept, found, net)
        return found
    if kept.begun:
        raise ValueError(
            f"{kept.file}: is missing, and images were begun with it, or on a machine without"
            f" integers; {kept.again}"
        )

    # Measured here, for there is no file of an earlier choice.
    times = timed(net, run)
    names = chosen(times, min_speedup)

    of = sum(isinstance(module, QuantLayer) for module in net.modules())

    print_table(
        f"{len(names)} of {of} quantized layers run on integers",
        ["layer and input", "count", "simulated, ms", "integer, ms", "runs on"],
        [
            (
                e.shape,
                len(e.names),
                1e3 * e.simulated,
                1e3 * e.integer,
                "integers" if e.names[0] in names else "floats",
            )
            for e in times
        ],
    )

    # Kept: the choice changes the last bits of an image.
    shapes = [dataclasses.asdict(entry) for entry in times]
    made = {"layers": names, "of": of, "min_speedup": min_speedup, "shapes": shapes}
    made["sample"] = kept.sample
    files.write_json(kept.file, made)
    return made


def _require_choice(kept: Kept, found: Mapping[str, Any], net: nn.Module) -> None:
    """Refuse a choice that was made for other images, or for another network.

    Raises:
        ValueError: naming the file.
    """
    stated = found.get("sample", kept.sample)  # an earlier version did not note it
    if stated != kept.sample:
        reason = f"the choice for the images {stated}, not {kept.sample}"
        raise files.damaged(kept.file, reason, kept.again)

    layers = found["layers"]
    if not isinstance(layers, list) or not {*map(str, layers)} <= {*candidates(net)}:
        raise files.damaged(kept.file, "it names layers that can't run on integers", kept.again)


def _units(net: nn.Module, found: dict[str, IntegerLayer]) -> list[tuple[tuple[str, ...], Any]]:
    """Return (names, the quantizer they share, if any): q, k and v are timed together."""
    units: list[tuple[tuple[str, ...], Any]] = []
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer) and name in found and module.input_quantizer is not None:
            units.append(((name,), None))
        elif isinstance(module, QuantAttention) and module.input_quantizer is not None:
            names = readers(net, name)
            if names and all(n in found for n in names):
                units.append((names, module.input_quantizer))
    return units


def _shape(net: nn.Module, names: tuple[str, ...], x: Tensor) -> str:
    layer: Any = net.get_submodule(names[0])
    kind = "q, k, v" if len(names) > 1 else type(layer).__name__.removeprefix("Quant")
    weight = "x".join(str(n) for n in layer.weight_quantizer.codes.shape)
    affine = ", affine" if layer.weight_quantizer.zero_point is not None else ""
    stride = (
        f", stride {layer.layer.stride[0]}"
        if isinstance(layer.layer, nn.Conv2d) and layer.layer.stride[0] > 1
        else ""
    )
    return f"{kind} {weight}{stride}{affine} on {'x'.join(str(n) for n in x.shape)}"


def _call(layers: list[Any], reader: Any, x: Tensor) -> None:
    value = x if reader is None else reader(x)
    for layer in layers:
        layer(value)


def _medians(calls: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: sorted(values)[ROUNDS // 2] for name, values in times.items()}
