"""Products of codes: exact where the code says so.

`tests/test_other_kernels.py` runs this with the kernels of a CPU without VNNI instructions, too.
"""

from __future__ import annotations

import copy
import os
from functools import lru_cache

import numpy as np
import pytest
import torch

from tdq_exp.data.arrays import ImageStore
from tdq_exp.deploy import integer, products
from tdq_exp.experiment import engines
from tdq_exp.quant.chains import Chains
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.intervals.static import StaticIntervals
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.runtime.processes import Processes
from tests.oracles.products import ExactProduct, saturating_sums
from tests.quant.builders import load_model, make_net, randn

HERE = torch.device("cpu")
ALONE = ([1, 1], [0, 0], [1, 1], 1)
SHAPES = {
    "linear": ((7, 20), None, (3, 20)),
    "linear, wide": ((64, 256), None, (2, 5, 256)),
    "1x1": ((16, 3, 1, 1), ALONE, (2, 3, 4, 4)),
    "3x3": ((9, 6, 3, 3), ([1, 1], [1, 1], [1, 1], 1), (2, 6, 9, 9)),
    "3x3, wide": ((32, 64, 3, 3), ([2, 2], [1, 1], [1, 1], 1), (3, 64, 8, 8)),
    "dilated": ((8, 8, 3, 3), ([1, 1], [2, 2], [2, 2], 1), (2, 8, 9, 9)),
    "groups": ((9, 2, 3, 3), ([1, 1], [1, 1], [1, 1], 3), (2, 6, 9, 9)),
}
needs_kernels = pytest.mark.skipif(
    integer.unavailable(HERE) is not None, reason=str(integer.unavailable(HERE))
)


def random_codes(shape, low, high, dtype, seed):
    """Whole numbers from low to high, half of them the ends: that is where pairs are cut off."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, codes, ends).to(dtype)


def found_and_exact(shape, largest, smallest_weight, largest_weight):
    """A product by the kernel and by the oracle."""
    weight_shape, window, x_shape = SHAPES[shape]
    weight = random_codes(weight_shape, smallest_weight, largest_weight, torch.int8, 1)
    codes = random_codes(x_shape, 0, largest, torch.uint8, 2)
    if len(x_shape) == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
    scale, bias = randn(len(weight), seed=3).abs() + 0.1, randn(len(weight), seed=4)
    return tuple(
        kind(weight, scale, window)(codes, 0.25, 3, bias)
        for kind in (products.Product, ExactProduct)
    )


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "largest, weights", [(255, (-64, 64)), (127, (-128, 127)), (15, (-128, 127)), (255, (-7, 7))]
)
def test_a_product_is_exact_on_any_cpu_where_no_pair_can_leave_16_bits(shape, largest, weights):
    found, exact = found_and_exact(shape, largest, *weights)
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-5 * float(exact.abs().max()))


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_probe_says_of_a_cpu_holds_for_every_shape(shape):
    found, exact = found_and_exact(shape, 255, -128, 127)
    error = float((found - exact).abs().max() / exact.abs().max())
    if products.all_are_exact_here():
        assert error < 1e-5
    else:
        assert (
            error > 1e-3 or shape == "groups"
        )  # two channels of a group may run on a kernel without pairs


@needs_kernels
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" not in os.environ, reason="no kernels are kept back here")
def test_the_probe_finds_the_kernels_of_a_limited_cpu():
    """If it did not, the tests above would say nothing of a CPU without VNNI."""
    assert not products.all_are_exact_here()


@pytest.mark.parametrize(
    "largest, weight, fits",
    [
        (255, 64, True),
        (255, -64, True),
        (255, 65, False),
        (127, -128, True),
        (128, 127, True),
        (128, -128, False),
    ],
)
def test_the_limit_of_a_pair_is_where_sums_begin_to_be_cut_off(largest, weight, fits):
    weights = torch.full((1, 10), weight, dtype=torch.int8)
    assert products.never_saturates(largest, weights) == fits
    codes = np.full((1, 10), largest, dtype=np.uint8)
    cut_off = saturating_sums(codes, weights.numpy())
    assert (cut_off == 10 * largest * weight).all() == (fits or -2 * largest * weight == 2**15)


def test_random_codes_within_the_limit_are_never_cut_off():
    for largest, low, high in ((255, -64, 64), (127, -128, 127), (3, -128, 127)):
        weight = random_codes((11, 31), low, high, torch.int8, 0)
        codes = random_codes((13, 31), 0, largest, torch.uint8, 1)
        assert products.never_saturates(largest, weight)
        exact = codes.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
        assert np.array_equal(saturating_sums(codes.numpy(), weight.numpy()), exact)


def test_sums_that_leave_32_bits_are_told_from_those_that_can_not():
    most = products.SUM_LIMIT // (255 * 128)
    weights = torch.full((2, most + 1), -128, dtype=torch.int8)
    assert products.fits_32_bits(255, weights[:, :most])
    assert not products.fits_32_bits(255, weights)
    assert products.fits_32_bits(254, weights)

    # What counts is the row with the largest sum, not the largest weight.
    weights[:, 1:] = 127
    assert products.fits_32_bits(255, weights)
    if integer.unavailable(HERE) is None:
        largest = 127 if products.all_are_exact_here() else 64  # without VNNI pairs are cut off
        weights[:] = largest
        codes = torch.full((1, most), 255, dtype=torch.uint8)
        found = products.Product(weights[:, :most], torch.ones(2))(codes, 1.0, 0)
        assert float(found[0, 0]) == pytest.approx(255 * largest * most)


def test_a_layer_whose_sums_may_leave_32_bits_stays_simulated_and_is_not_exported(monkeypatch):
    monkeypatch.setattr(products, "SUM_LIMIT", 255 * 128 * 100)
    left = integer.left_out(net_of(8))
    long = {name for name, why in left.items() if why == integer.TOO_LONG}
    assert long and not long & integer.candidates(net_of(8)).keys()

    graph = pytest.importorskip("tdq_exp.deploy.onnx.graph", reason="export is an optional extra")
    with pytest.raises(ValueError, match="can't be exported on integers, its sums may not fit"):
        graph.graph_of(net_of(8), {}, "integer")


@pytest.fixture
def without_vnni(monkeypatch):
    """As if this CPU had no VNNI instructions."""
    monkeypatch.setattr(products, "all_are_exact_here", lambda: False)


@lru_cache
def net_of(bits, **options):
    """A network that is read, and never changed."""
    return bake(make_net(Recipe(bits, bits, Lsq, Lsq, StaticIntervals(), **options)))


@needs_kernels
def test_without_vnni_layers_of_8_by_8_bits_stay_simulated_and_all_others_run_on_codes(
    without_vnni,
):
    quantized = {
        name for name, module in net_of(7).named_modules() if isinstance(module, QuantLayer)
    }
    assert integer.candidates(net_of(7)).keys() == quantized
    assert integer.candidates(net_of(8)) == {}
    assert integer.codable(net_of(8)).keys() == quantized
    edges = quantized - integer.candidates(net_of(4, plan=Plan(edge_bits=8))).keys()
    assert edges == {"conv_in", "conv_out"}


@needs_kernels
def test_q_k_and_v_are_exact_together_or_not_at_all(without_vnni):
    net = copy.deepcopy(net_of(8))
    names = sorted(name for name in integer.codable(net) if name.endswith(".to_q"))
    layer = net.get_submodule(names[0])
    layer.weight_quantizer.codes.clamp_(-3, 3)  # this one would fit, its k and v do not
    assert integer.candidates(net) == {}
    for leaf in ("to_k", "to_v"):
        net.get_submodule(names[0].replace("to_q", leaf)).weight_quantizer.codes.clamp_(-3, 3)
    assert len(integer.candidates(net)) == 3


@needs_kernels
def test_without_vnni_a_layer_that_would_be_wrong_is_refused_by_name(without_vnni):
    with pytest.raises(
        ValueError, match="conv_in: can't run on codes here: 8-bit by 8-bit products are cut off"
    ):
        integer.integerize(net_of(8), Chains(), ["conv_in"])


@needs_kernels
def test_without_vnni_a_w8a8_net_is_simulated_and_a_line_says_why(without_vnni, tmp_path, capsys):
    net, processes = net_of(8), Processes(cpu=True)
    images = engines.ImageSet(tmp_path, ImageStore(tmp_path / "images", 2, 2, (8, 8, 1)))
    running, engine = engines.engine(net, load_model("tiny"), "integer", images, processes, 0)
    processes.close()
    assert running is net and engine == f"fake: {integer.INEXACT}"
    assert "8-bit by 8-bit products are cut off" in " ".join(capsys.readouterr().out.split())
