"""A baked network as one ONNX graph with its tables inside: x_t and t in, the prediction out.

Two forms of a layer, `s` and `z` gathered from the tables by t:

    integer    QuantizeLinear(x, s_t, z_t) -> QLinearConv -> DequantizeLinear -> + b, and
               MatMulInteger for linear layers: what ONNX Runtime runs on codes. QLinearConv writes
               8-bit codes, so a convolution's output is quantized once more, on a range of its own
               for each t that was seen in sampling; linear layers are exact. Weights are signed
               bytes, or unsigned ones where products of signed ones would not be exact on every
               CPU: a W8A8 step of `ddim_small` then takes 1.2 to 1.4 times as long on a CPU with
               VNNI.
    portable   clip(round(x / s_t)) + z_t -> Q, DQ with a constant step 1 -> conv -> s_t: nothing in
               the quantizer depends on t, which is what other runtimes need to recognise it. It
               gives what simulated quantization gives.

The last convolution, whose output is the prediction itself, takes the portable form in both. Affine
8-bit weights need a second sum (see `integer`), here one of floats over a single channel. Attention
products are simulated, as in the integer engine.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.deploy.coders import largest_code, signed_codes, too_wide
from tdq_exp.deploy.integer import TOO_LONG, codable, reason_against
from tdq_exp.deploy.onnx.layers import (
    OPSET,
    Clock,
    Codes,
    IntegerConv,
    IntegerLinear,
    Portable,
    PortableLayer,
    Simulated,
)
from tdq_exp.deploy.products import fits_32_bits
from tdq_exp.quant.convert import replace_module
from tdq_exp.quant.layers import CodedWeight, QuantAttention, QuantConv2d, QuantLayer

FORMS = ("integer", "portable")


class Graph(nn.Module):
    """(x_t, t) -> prediction.

    A t that is no time step is an error where it is read from a table. ONNX would count a negative
    one from the table's end, so it becomes T, which no table has.

    Args:
        net: with its quantized layers in the graph's form.
        clock: the one that they read.
    """

    def __init__(self, net: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.net, self.clock = net, clock
        self.steps: int = net.time.steps  # type: ignore[union-attr,assignment]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return eps_hat of `[B, C, H, W]` and an int64 number."""
        t = torch.where(t < 0, self.steps, t)
        self.clock.t = t
        return self.net(x, t, return_dict=False)[0]


def first_sum(layer: QuantConv2d, x: Tensor, y: Tensor) -> Tensor:
    """Return what QLinearConv gives: y without the bias and the second sum of affine weights."""
    conv, coded = layer.layer, layer.weight_quantizer
    assert isinstance(coded, CodedWeight) and layer.input_quantizer is not None
    if conv.bias is not None:
        y = y - conv.bias.reshape(-1, 1, 1)
    rest = signed_codes(coded)[1]
    if not rest.any():
        return y
    ones = torch.ones(1, 1, *conv.kernel_size)
    sums = layer.input_quantizer(x).sum(1, keepdim=True)
    where = (conv.stride, conv.padding, conv.dilation)
    second = F.conv2d(sums, ones, None, *where)  # type: ignore[arg-type]
    return y - second * (rest * coded.step_size.reshape(-1)).reshape(-1, 1, 1)


def output_ranges(
    seen: Mapping[str, list[tuple[int, float, float]]], steps: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the range of every convolution's first sum for each t, `[T]`.

    Between and beyond the time steps that were seen it is interpolated.

    Args:
        seen: (t, smallest, largest) of each, in any order.
        steps: T.
    """
    found = {}
    for name in seen:
        entries = sorted(seen[name])
        t = [entry[0] for entry in entries]
        every = torch.arange(steps)

        # Linear between two seen t; constant before the first and after the last.
        rows = []
        for column in (1, 2):
            values = torch.tensor([entry[column] for entry in entries])
            right = torch.searchsorted(torch.tensor(t), every).clamp(1, max(1, len(t) - 1))
            if len(t) == 1:
                rows.append(values.expand(steps).clone())
                continue

            left = right - 1
            start, end = torch.tensor(t)[left], torch.tensor(t)[right]
            share = ((every - start) / (end - start)).clamp(0, 1)
            rows.append(values[left] + share * (values[right] - values[left]))

        found[name] = (rows[0], rows[1])
    return found


def graph_of(net: nn.Module, ranges: Mapping[str, tuple[Tensor, Tensor]], form: str) -> Graph:
    """Return a copy of a baked network whose quantized layers are operators of ONNX.

    Args:
        net: baked, in eval mode, on the CPU.
        ranges: see `output_ranges`; of the integer form.
        form: one of `FORMS`.

    Raises:
        ValueError: for a layer that has no such form: dynamic intervals, codes wider than a byte,
            sums that 32 bits may not hold.
    """
    clock, net = Clock(), copy.deepcopy(net)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, QuantConv2d)]

    # Refuse before anything is replaced.
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantLayer):
            reason = reason_against(module)
            if reason is not None:
                raise ValueError(f"{name}: can't be exported, {reason}")

    for name, quantizer in codable(net).items() if form == "integer" else ():
        layer: Any = net.get_submodule(name)
        if not fits_32_bits(largest_code(quantizer), signed_codes(layer.weight_quantizer)[0]):
            raise ValueError(
                f"{name}: can't be exported on integers, {TOO_LONG}; take --form portable"
            )

    # Attention: one reader for q, k and v, and its products simulated.
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantAttention):
            block = name.rpartition(".")[0]
            if module.input_quantizer is not None:
                module.input_quantizer = (Codes if form == "integer" else Portable)(
                    module.input_quantizer, clock
                )  # type: ignore[assignment]

            for part in ("q", "k", "v", "probabilities"):
                quantizer = getattr(module, part)
                if quantizer is not None:
                    if too_wide(quantizer):
                        raise ValueError(
                            f"{block}.{part}: can't be exported, its codes are wider than 8 bits"
                        )
                    setattr(module, part, Simulated(quantizer, clock))

    # Layers, which read what their attention was given above.
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantLayer):
            replace_module(
                net, name, _layer(net, name, module, ranges, form, clock, name == convolutions[-1])
            )

    return Graph(net, clock).eval()


def _layer(
    net: nn.Module,
    name: str,
    layer: QuantLayer,
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    form: str,
    clock: Clock,
    last: bool,
) -> nn.Module:
    quantizer = layer.input_quantizer

    # q, k and v: their input comes in the form that it was given before.
    if quantizer is None:
        siblings = net.get_submodule(name.rpartition(".")[0]).children()
        attention = next(module for module in siblings if isinstance(module, QuantAttention))
        reader = attention.input_quantizer
        return (
            IntegerLinear(layer, reader, shared=True)
            if isinstance(reader, Codes)
            else PortableLayer(layer, None)
        )

    if form == "portable" or last:
        return PortableLayer(layer, Portable(quantizer, clock))

    if isinstance(layer, QuantConv2d):
        low, high = ranges[name]
        return IntegerConv(layer, Codes(quantizer, clock), low, high, clock)
    return IntegerLinear(layer, Codes(quantizer, clock))


def write(graph: nn.Module, shape: tuple[int, ...], file: Path) -> int:
    """Write the graph, for any batch size, and return the bytes of the file.

    Args:
        graph: (x, t) -> prediction.
        shape: of one sample.
        file: `*.onnx`.
    """

    # Any batch size; t is a number for the whole batch. diffusers' upsampling asks whether there
    # are 64 samples, only for the layout of memory: without the limit torch records the network,
    # meets that question, and records it again. The operators are those of any batch.
    x, t = torch.zeros(2, *shape), torch.tensor(1)
    batch = torch.export.Dim("batch", min=1, max=63)

    program = torch.onnx.export(
        graph,
        (x, t),
        dynamo=True,
        opset_version=OPSET,
        input_names=["x_t", "t"],
        output_names=["prediction"],
        dynamic_shapes={"x": {0: batch}, "t": {}},
        optimize=True,
        verbose=False,
    )

    assert program is not None
    model = program.model_proto

    # Where each node came from in our source is twice as long as the weights, and torch's notes on
    # the graph name the limit of the batch above, which the graph has not.
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""

    for value in [
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ]:
        del value.metadata_props[:]

    file.write_bytes(signed(model.SerializeToString()))
    return file.stat().st_size


def signed(graph: bytes) -> bytes:
    """Return a graph as bytes, with a note of the CRC-32 of all before it at its end.

    The note is one more entry of the model's `metadata_props`: protobuf joins them.
    """
    entry = b"\x0a\x05crc32\x12\x08" + f"{zlib.crc32(graph):08x}".encode()
    return graph + b"\x72" + bytes([len(entry)]) + entry


def is_whole(file: Path) -> bool | None:
    """Return whether a graph matches its checksum, or None if it has none."""
    content = file.read_bytes()
    length = len(signed(b""))
    if not content[-length:].startswith(signed(b"")[:-8]):
        return None
    return content == signed(content[:-length])


def operators(file: Path) -> dict[str, int]:
    """Return how many operators of each kind a graph holds, subgraphs left out."""
    import onnx

    found: dict[str, int] = {}
    for node in onnx.load(str(file)).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def parity(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|, root of mean squares."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=math.ulp(1.0)))
