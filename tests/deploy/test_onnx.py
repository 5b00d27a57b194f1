"""ONNX graphs against simulated quantization: one layer at a time exactly, and a whole network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdq_exp.commands import export
from tdq_exp.config.compose import compose
from tdq_exp.deploy.onnx import graph as onnx
from tdq_exp.deploy.onnx import layers as onnx_layers
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.experiment.finished_run import load
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import LookupTable
from tdq_exp.quant.intervals.dynamic import DynamicIntervals
from tdq_exp.quant.layers import CodedWeight, QuantConv2d, QuantLinear
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMaxWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import TableZeroPoint
from tests.quant.builders import make_net, randn

STEPS = 10
onnxruntime = pytest.importorskip("onnxruntime", reason="export is an optional extra")
onnx_format = pytest.importorskip("onnx", reason="export is an optional extra")
pytestmark = pytest.mark.usefixtures("operators_listed_once")


class Alone(nn.Module):
    """One layer as a network of (x, t)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.time = layer, TimeContext(STEPS)

    def forward(self, x: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.layer(x),)


def quantizer(bits: int, n: int, time: TimeContext) -> Lsq:
    """Baked, with step sizes and zero points of t."""
    grid = Grid(bits, symmetric=n < 0)
    s = 0.5 / 2**bits * (1 + torch.arange(STEPS) / 3.0) * 8
    z = torch.zeros(STEPS) if n < 0 else torch.arange(STEPS).float().clamp(max=grid.p)
    return Lsq(grid, LookupTable(s, time), TableZeroPoint(z, time)).eval()


def coded(shape: tuple[int, ...], kind: str) -> CodedWeight:
    """Signed codes, or affine ones that need one sum (4 bits) or two (8)."""
    low, high = {"signed": (-7, 8), "affine4": (0, 16), "affine8": (0, 256)}[kind]
    codes = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))
    codes.reshape(-1)[:2] = torch.tensor([low, high - 1])
    out = (-1, *[1] * (len(shape) - 1))
    if kind == "signed":
        return CodedWeight(codes.to(torch.int8), torch.tensor(0.05))
    zero = torch.randint(low, high, (shape[0],), generator=torch.Generator().manual_seed(2)).float()
    return CodedWeight(
        codes.to(torch.uint8),
        (randn(shape[0], seed=3).abs() + 0.1).reshape(out) / 50,
        zero.reshape(out),
    )


def run(layer: nn.Module, clock: onnx_layers.Clock, x: Tensor, file, t: int) -> Tensor:
    if not file.exists():
        onnx.write(onnx.Graph(Alone(layer), clock).eval(), tuple(x.shape[1:]), file)
    return torch.from_numpy(
        export.session(file).run(None, {"x_t": x.numpy(), "t": np.array(t, dtype=np.int64)})[0]
    )


def test_weights_are_unsigned_only_where_signed_ones_would_not_be_exact_everywhere():
    for largest, lowest, unsigned in (
        (255, -128, True),
        (255, -64, False),
        (127, -128, False),
        (128, -128, True),
    ):
        codes = torch.randint(
            lowest, -lowest, (5, 8), generator=torch.Generator().manual_seed(0)
        ).to(torch.int8)
        codes[0, 0] = lowest
        weight, zero = onnx_layers.exact_anywhere(codes, largest)
        assert weight.dtype == zero.dtype == (torch.uint8 if unsigned else torch.int8)
        assert torch.equal(weight.int() - zero.int(), codes.int())


def signed_products(file) -> list[bool]:
    """Is no pair of products cut off, of every operator of a graph that multiplies codes by signed bytes?

    Raises:
        AssertionError: if one may be, which would give wrong numbers on a CPU without VNNI instructions.
    """
    graph = onnx_format.load(str(file)).graph
    values = {value.name: onnx_format.numpy_helper.to_array(value) for value in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type in ("QLinearConv", "MatMulInteger"):
            weight = values[node.input[3 if node.op_type == "QLinearConv" else 1]]
            maker = makers[node.input[0]]
            largest = int(values[maker.input[2]]) if maker.op_type == "Clip" else 255
            found.append(weight.dtype == np.int8)
            assert (
                weight.dtype == np.uint8
                or 2 * largest * int(np.abs(weight.astype(int)).max()) < 2**15
            ), node.name
    return found


@pytest.mark.parametrize(
    ("bits", "n", "kind", "options"),
    [
        (4, 0, "signed", {"stride": 2}),
        (8, 0, "affine8", {}),
        (8, -1, "signed", {"padding": 2, "dilation": 2}),
        (3, 0, "affine4", {"groups": 1, "bias": False}),
    ],
)
@torch.no_grad()
def test_a_convolution_in_both_forms(bits, n, kind, options, tmp_path):
    time, clock = TimeContext(STEPS), onnx_layers.Clock()
    conv = nn.Conv2d(6, 9, 3, **{"padding": 1, **options})
    reads = quantizer(bits, n, time)
    layer = QuantConv2d(conv, coded(tuple(conv.weight.shape), kind), reads)
    x = randn(3, 6, 9, 9)  # the graph is written for a batch of 2
    expected = {}
    seen = []
    for t in (0, 9):
        with time.at(t):
            expected[t] = layer(x)
            part = onnx.first_sum(layer, x, expected[t])
            seen.append((t, float(part.min()), float(part.max())))
    portable = onnx_layers.PortableLayer(layer, onnx_layers.Portable(reads, clock))
    ranges = onnx.output_ranges({"conv": seen}, STEPS)["conv"]
    integer = onnx_layers.IntegerConv(layer, onnx_layers.Codes(reads, clock), *ranges, clock)
    for t, y in expected.items():
        found = run(portable, clock, x, tmp_path / "portable.onnx", t)
        assert float((found - y).abs().max()) <= 1e-5 * float(y.abs().max())
        found = run(integer, clock, x, tmp_path / "integer.onnx", t)
        step = float(ranges[1][t].clamp(min=0) - ranges[0][t].clamp(max=0)) / 255
        assert float((found - y).abs().max()) <= 0.5001 * step + 1e-5 * float(y.abs().max())
    assert export.optimised_operators(tmp_path / "integer.onnx").get("QLinearConv") == 1
    assert signed_products(tmp_path / "integer.onnx") == [kind != "affine8"]


@pytest.mark.parametrize(
    ("bits", "n", "kind"), [(4, 0, "signed"), (8, 0, "affine8"), (8, -1, "signed")]
)
@torch.no_grad()
def test_a_linear_layer_is_exact_in_both_forms(bits, n, kind, tmp_path):
    time, clock = TimeContext(STEPS), onnx_layers.Clock()
    linear = nn.Linear(20, 7)
    reads = quantizer(bits, n, time)
    layer = QuantLinear(linear, coded((7, 20), kind), reads)
    x = randn(3, 5, 20)
    for form, made in (
        ("portable", onnx_layers.PortableLayer(layer, onnx_layers.Portable(reads, clock))),
        ("integer", onnx_layers.IntegerLinear(layer, onnx_layers.Codes(reads, clock))),
    ):
        for t in (0, 9):
            with time.at(t):
                y = layer(x)
            found = run(made, clock, x, tmp_path / f"{form}.onnx", t)
            assert float((found - y).abs().max()) <= 1e-5 * float(y.abs().max())

        for t in (-1, STEPS):
            with pytest.raises(Exception, match="indices element out of data bounds"):
                run(made, clock, x, tmp_path / f"{form}.onnx", t)
    assert signed_products(tmp_path / "integer.onnx") == [kind != "affine8"]
    kinds = export.optimised_operators(tmp_path / "integer.onnx")
    assert kinds.get("MatMulIntegerToFloat", 0) + kinds.get("MatMulInteger", 0) == 1


def test_ranges_between_and_beyond_what_was_seen():
    low, high = onnx.output_ranges({"conv": [(6, -3.0, 4.0), (2, -1.0, 8.0)]}, STEPS)["conv"]
    assert low.tolist() == [-1, -1, -1, -1.5, -2, -2.5, -3, -3, -3, -3]
    assert high.tolist() == [8, 8, 8, 7, 6, 5, 4, 4, 4, 4]
    low, high = onnx.output_ranges({"conv": [(4, -1.0, 2.0)]}, STEPS)["conv"]
    assert low.tolist() == [-1] * STEPS and high.tolist() == [2] * STEPS


def test_what_has_no_table_or_no_bytes_is_refused_by_name():
    dynamic = bake(make_net(Recipe(4, 4, Lsq, Lsq, DynamicIntervals(True))))
    with pytest.raises(ValueError, match="read from the input has no table"):
        onnx.graph_of(dynamic, {}, "portable")
    wide = bake(make_net(Recipe(4, 9, MinMaxWeights, Lsq, weight_interval="channel_range")))
    with pytest.raises(
        ValueError, match="conv_in: can't be exported, its input is wider than 8 bits"
    ):
        onnx.graph_of(wide, {}, "portable")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of a network of one level: residual blocks and attention.

    Exporting takes a second for each block. Changes of size are in the latent network that
    `test_latent_runs` exports, and strides in a layer by itself.
    """
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        "model.definition.network.block_out_channels=[8]",
        "model.definition.network.down_block_types=[AttnDownBlock2D]",
        "+model.definition.network.mid_block_type=null",
        "model.definition.network.up_block_types=[UpBlock2D]",
        "model=tiny", "method=minmax", "tdq=none", "bits=w8a8", f"model.weights={folder / 'tiny.safetensors'}", f"out={folder}",
        "debug=smoke", "tracker=none",
    ]  # fmt: skip
    made = jobs.build(compose(arguments))
    save_weights(made.model.build().state_dict(), folder / "tiny.safetensors", {})
    pipeline.run(made)
    return made.folder


def test_the_command_writes_and_says_what_runs_on_integers(run_folder, tmp_path, capsys):
    file = tmp_path / "net.onnx"
    export.export(run_folder, file, images=2)
    said = capsys.readouterr().out
    assert "integer form" in said and "QLinearConv" in said and "control" in said
    convolutions = sum(isinstance(m, QuantConv2d) for m in load(run_folder)[1].modules())
    assert export.optimised_operators(file)["QLinearConv"] == convolutions - 1  # all but the last
    assert not all(signed_products(file))  # W8A8
    with pytest.raises(ValueError, match="exists; remove it or name another file"):
        export.export(run_folder, file)


def test_bad_options_of_the_command_are_one_line(run_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--form=other: choose integer or portable"):
        export.export(run_folder, tmp_path / "a.onnx", "other")
    with pytest.raises(ValueError, match="must end in .onnx"):
        export.export(run_folder, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="--images=0"):
        export.export(run_folder, tmp_path / "a.onnx", images=0)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        export.export(tmp_path, tmp_path / "a.onnx")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"export needs onnx, onnxruntime, onnxscript: pip install 'tdq_exp\[onnx\]'",
    ):
        export.export(run_folder, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
