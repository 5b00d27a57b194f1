"""Which layers run on codes: each kind and shape of layer is timed both ways at load time.

Small layers can be slower on codes, where quantizing the input and calling the kernel cost more
than the product saves. The choice changes the last bits of an image, so a sampled set keeps the
choice that it was begun with. On a GPU, both are timed in CUDA graphs, the integer form with each
tile of its kernel, and the whole network at the end: norms and layouts between layers count there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.deploy import stopwatch
from tdq_exp.deploy.gpu import GpuLayer
from tdq_exp.deploy.integer import (
    byte_source,
    candidates,
    codable,
    integerize,
    left_out,
    readers,
    runs_on_gpu,
)
from tdq_exp.quant.chains import Chains
from tdq_exp.quant.kernels.integer_operators import TILES
from tdq_exp.quant.layers import QuantAttention, QuantLayer
from tdq_exp.runtime import files
from tdq_exp.runtime.progress import console, print_table


@dataclass(frozen=True)
class Timed:
    """One shape of layer.

    Args:
        names: of the layers that share it.
        shape: what they are, to print.
        simulated, integer: median seconds of a call; None if it failed.
        tile: of a GPU's kernel, the fastest.
        error: of the kernel, if it can't take the shape, or of the simulated form.
    """

    names: tuple[str, ...]
    shape: str
    simulated: float | None
    integer: float | None
    tile: tuple[int, ...] = ()
    error: str | None = None

    @property
    def speedup(self) -> float:
        """Return simulated time over integer time; -1 where one of them is unknown."""
        if self.simulated is None or self.integer is None:
            return -1.0
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
        """Return what a message of an error says to do about the choice."""
        images = self.file.parent / "images"
        return f"put the right one back, or remove {images} and what is there of it to begin again"

    def read(self) -> dict[str, Any] | None:
        """Return the choice, or None if there is no file.

        Raises:
            ValueError: if it is damaged, or of other images.
        """
        found = files.read_json(self.file, needs=["layers", "of"])
        if found is None:
            return None

        stated = found.get("sample", self.sample)  # an earlier version did not note it
        if stated != self.sample:
            reason = f"the choice for the images {stated}, not {self.sample}"
            raise files.damaged(self.file, reason, self.again)

        layers = found["layers"]
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise files.damaged(self.file, "its layers are no list of names", self.again)
        return found


def name_of(found: Mapping[str, Any]) -> str:
    """Return the name of the engine with a choice of layers, for rows and records."""
    return f"integer: {len(found['layers'])} of {found['of']} layers"


@torch.no_grad()
def timed(net: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Timed]:
    """Time every candidate on the input that it gets in a run of the network, one of each shape.

    Args:
        net: baked, in eval mode.
        run: a forward pass at the batch size and time step of interest.
    """
    found = candidates(net)
    units = _units(net, found)
    readers = dict(units)
    shapes, inputs = _inputs(net, units, run)

    # Units of one shape take the same time: the first stands for all.
    result = []
    for shape, same in shapes.items():
        names = same[0]
        x, reader = inputs[shape], readers[names]
        layers = [net.get_submodule(name) for name in names]
        coded = [found[name] for name in names]

        # Each form gets the layout that it runs on: channels last for codes.
        last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        coder = byte_source(reader, runs_on_gpu(net)) if reader is not None else None
        forms = {
            f"integer {number}": partial(_call, coded, coder, last, tile)
            for number, tile in enumerate(TILES if runs_on_gpu(net) else [()])
        }

        calls = {"simulated": partial(_call, layers, reader, x), **forms}
        seconds, failed = stopwatch.medians(calls, x.device, stopwatch.CALLS)
        result.append(_entry(tuple(n for names in same for n in names), shape, seconds, failed))

    return result


def _inputs(
    net: nn.Module, units: list[tuple[tuple[str, ...], Any]], run: Callable[[nn.Module], Tensor]
) -> tuple[dict[str, list[tuple[str, ...]]], dict[str, Tensor]]:
    """Return the units of each shape that a run of the network shows, and an input of each shape.

    One is kept of a shape: the inputs of all units may be more than a GPU's memory.
    """
    inputs: dict[str, Tensor] = {}
    shape_of: dict[tuple[str, ...], str] = {}

    def keep(names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            shape_of[names] = _shape(net, names, args[0])
            inputs.setdefault(shape_of[names], args[0].detach())

        return hook

    handles = []
    for names, reader in units:
        source = reader if reader is not None else net.get_submodule(names[0])
        handles.append(source.register_forward_pre_hook(keep(names)))
    try:
        run(net)
    finally:
        for handle in handles:
            handle.remove()

    # In the order of the network, whatever runs first.
    shapes: dict[str, list[tuple[str, ...]]] = {}
    for names, _ in units:
        if names in shape_of:
            shapes.setdefault(shape_of[names], []).append(names)
    return shapes, inputs


def _entry(
    names: tuple[str, ...], shape: str, seconds: Mapping[str, float], failed: Mapping[str, str]
) -> Timed:
    """Return the result of one shape: it stays simulated where that can't be timed."""
    if "simulated" in failed:
        error = f"could not be timed: its simulated form ended with {failed['simulated']}"
        return Timed(names, shape, None, None, (), error)
    simulated, *forms = seconds
    if not forms:
        return Timed(names, shape, seconds[simulated], None, (), next(iter(failed.values())))
    best = min(forms, key=seconds.__getitem__)
    tile = TILES[int(best.split()[1])] if len(forms) + len(failed) > 1 else ()
    return Timed(names, shape, seconds[simulated], seconds[best], tile)


def chosen(times: list[Timed], min_speedup: float) -> list[str]:
    """Return the names of the layers whose shape gains at least so much."""
    return [name for entry in times if entry.speedup >= min_speedup for name in entry.names]


def choice(
    net: nn.Module,
    run: Callable[[nn.Module], Tensor],
    min_speedup: float,
    kept: Kept,
    chains: Chains | None = None,
) -> dict[str, Any]:
    """Return which layers run on codes: from the file of an earlier choice, or measured anew.

    Args:
        net: baked, in eval mode, on the device that it runs on.
        run: see `timed`.
        min_speedup: least gain of a layer; 0 takes every layer that can. A whole step only must
            not lose by it.
        kept: where the choice is kept, and for which images.
        chains: of the network; with them, the whole network is compared on a GPU.

    Returns:
        `layers`: their names; `of`: how many quantized layers there are; `shapes`: what was
            measured; `simulated`: by name, why a layer is not among `layers`; `sample`: of which
            images; on a GPU also `tiles` by name, and `step`, the seconds of both whole networks,
            and `failed`, the errors of those without.

    Raises:
        ValueError: if the file is damaged, of other images or another network; and where images
            were begun with it, if it is missing, or its layers can't run here.
    """
    found = kept.read()
    reason = None if found is None else _reason_against(kept, found, net)
    if found is not None and reason is None:
        return found

    if found is not None and kept.begun:
        images = kept.file.parent / "images"
        raise ValueError(
            f"{kept.file}: {reason}; go on where its images were begun, or remove {images} to begin"
            " again"
        )
    if kept.begun:
        raise ValueError(
            f"{kept.file}: is missing, but there are images, made with it or on a machine without"
            f" integer kernels; {kept.again}"
        )

    # Measured here: there is no earlier choice, or none that an image was made with.
    times = timed(net, run)
    names = chosen(times, min_speedup)
    made: dict[str, Any] = {
        "layers": names,
        "of": sum(isinstance(module, QuantLayer) for module in net.modules()),
        "min_speedup": min_speedup,
        "shapes": [dataclasses.asdict(entry) for entry in times],
    }

    # A GPU: all of it together, too. A choice that makes the whole slower is no choice.
    failure: str | None = None
    if runs_on_gpu(net):
        made["tiles"] = {n: entry.tile for entry in times for n in entry.names if n in names}
        if chains is not None and names:
            made["step"], made["failed"] = whole_step(net, run, chains, made)
            failure = made["failed"].get("integer")
            if failure is not None or _slower(made["step"], min_speedup):
                names = made["layers"] = []

    _print(times, made)
    made["simulated"] = left_out(net) | {
        name: entry.error or failure or f"as a layer {entry.speedup:.2f} times as fast on integers"
        for entry in times
        for name in entry.names
        if name not in names
    }

    # Kept: the choice changes the last bits of an image.
    made["sample"] = kept.sample
    files.write_json(kept.file, made)
    return made


@torch.no_grad()
def whole_step(
    net: nn.Module, run: Callable[[nn.Module], Tensor], chains: Chains, made: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of `run`, recorded, of the simulated and of the integer network.

    A form that failed, for want of memory or in a kernel, is in the second result with its error.
    """
    device = next(net.parameters()).device
    try:
        whole = integerize(net, chains, made["layers"], made["tiles"])
    except torch.OutOfMemoryError as error:
        return {}, {"integer": stopwatch.in_one_line(error)}
    calls = {"simulated": partial(run, net), "integer": partial(run, whole)}
    return stopwatch.medians(calls, device)


def _slower(step: Mapping[str, float], min_speedup: float) -> bool:
    """Return whether a whole step is slower on integers; False if it could not be timed.

    `min_speedup` is the least gain of a single layer; the whole step only must not get slower.
    """
    if not step.keys() >= {"simulated", "integer"}:
        return False
    return step["simulated"] < min(min_speedup, 1.0) * step["integer"]


def _print(times: list[Timed], made: Mapping[str, Any]) -> None:
    """Print what was measured, and what was chosen."""
    print_table(
        f"{len(made['layers'])} of {made['of']} quantized layers run on integers",
        ["layer and input", "count", "simulated, ms", "integer, ms", "runs on"],
        [
            (
                e.shape,
                len(e.names),
                *("-" if s is None else 1e3 * s for s in (e.simulated, e.integer)),
                "integers" if e.names[0] in made["layers"] else "floats",
            )
            for e in times
        ],
    )
    if "step" in made:
        console.print(_of_step(made))


def _of_step(made: Mapping[str, Any]) -> str:
    """Return in a line what the whole network's two forms took, and what follows."""
    failed, end = made["failed"], "; integers are not faster, quantization is simulated"
    if "integer" in failed:
        end = f"; quantization is simulated: a step with integers ended with {failed['integer']}"
    elif failed:
        end = (
            f"; layers are chosen by themselves: a simulated step ended with {failed['simulated']}"
        )
    elif made["layers"]:
        end = ""
    forms = {"simulated": "simulated", "integer": "with integers"}
    taken = [f"{1e3 * s:.3f} ms {forms[form]}" for form, s in made["step"].items()]
    return f"a whole step: {', '.join(taken) or 'not timed'}{end}"


def _reason_against(kept: Kept, found: Mapping[str, Any], net: nn.Module) -> str | None:
    """Return why an earlier choice can't be taken here, or None.

    Raises:
        ValueError: naming the file, if it is the choice for another network.
    """
    able, left = codable(net), left_out(net)
    if not set(found["layers"]) <= able.keys():
        raise files.damaged(kept.file, "it names layers that can't run on integers", kept.again)

    # Each kind of device has kernels, and with them last bits, of its own.
    of_gpu, on_gpu = "tiles" in found, runs_on_gpu(net)
    if of_gpu != on_gpu:
        then, now = ("a GPU" if gpu else "a CPU" for gpu in (of_gpu, on_gpu))
        return f"its layers were chosen on {then}, and this is {now}"
    name = next((name for name in found["layers"] if name in left), None)
    return None if name is None else f"{name} ran on integers, and here {left[name]}"


def _units(net: nn.Module, found: Mapping[str, nn.Module]) -> list[tuple[tuple[str, ...], Any]]:
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


def _call(layers: list[Any], reader: Any, x: Tensor, tile: tuple[int, ...] = ()) -> Tensor:
    value = x if reader is None else reader(x)
    for layer in layers:
        if isinstance(layer, GpuLayer):
            layer.tile = tile
        y = layer(value)
    return y
