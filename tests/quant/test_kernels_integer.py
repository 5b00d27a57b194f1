"""Integer execution on a GPU: bytes and products of bytes, against integers in 64 bits.

The laws run on a GPU, and without one in the process that `test_other_kernels` starts with
TRITON_INTERPRET=1. Whether the kernels are compiled to products of bytes is tested anywhere: a
compiler for a GPU needs none.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tdq_exp.deploy import gpu
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import LookupTable
from tdq_exp.quant.kernels import integer_operators
from tdq_exp.quant.layers import CodedWeight, QuantLinear
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import TableZeroPoint
from tdq_exp.runtime.precision import products
from tests.oracles.products import integer_sums
from tests.quant.devices import INTERPRETED, devices

STEPS, T = 10, 3
# Name: codes, outputs, window (kernel, stride, padding, dilation; height and width of each).
SHAPES: dict[str, tuple[tuple[int, ...], int, list[int]]] = {
    "1x1, odd channels": ((1, 33, 4, 5), 17, [1, 1, 1, 1, 0, 0, 1, 1]),
    "1x1, stride 2": ((2, 4, 5, 4), 5, [1, 1, 2, 2, 0, 0, 1, 1]),
    "3x3": ((2, 6, 5, 7), 9, [3, 3, 1, 1, 1, 1, 1, 1]),
    "3x3, stride 2, even": ((1, 3, 6, 6), 4, [3, 3, 2, 2, 1, 1, 1, 1]),
    "3x3, stride 2, odd, no padding": ((2, 3, 7, 5), 4, [3, 3, 2, 2, 0, 0, 1, 1]),
    "3x3, one pixel": ((1, 5, 1, 1), 3, [3, 3, 1, 1, 1, 1, 1, 1]),
    "3x3, one output, many channels": ((1, 70, 3, 3), 1, [3, 3, 1, 1, 1, 1, 1, 1]),
    "dilated, wide padding": ((1, 4, 4, 5), 6, [3, 3, 1, 1, 3, 2, 2, 1]),
    "3x2, one channel": ((3, 1, 4, 4), 2, [3, 2, 1, 2, 0, 1, 1, 1]),
    "linear": ((5, 40), 18, []),
    "linear, tokens": ((2, 9, 20), 7, []),
    "linear, one number": ((1, 1), 1, []),
}
# Zero: byte 0, of a table over t, or one for each sample. Of the weights: `rest` or none.
ZEROS = ("none", "table", "sample")


def tile(device: str) -> tuple[int, ...]:
    """A small tile of the kernel where every program takes milliseconds, or one of those in use."""
    return (16, 16, 32, 4, 1) if device == "cpu" else integer_operators.TILES[3]


def numbers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """Whole numbers from low to high, a quarter of them the ends."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=generator) < 0.75, found, ends)


def images_last(x: Tensor) -> Tensor:
    """x in the layout that kernels read."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


class Case:
    """Arguments of a product of one shape, and what it has to give.

    Args:
        name: of `SHAPES`.
        zero: of `ZEROS`.
        affine: weights with zero points?
    """

    def __init__(self, name: str, zero: str, affine: bool, device: str) -> None:
        shape, outs, self.window = SHAPES[name]
        kernel = tuple(self.window[:2])
        codes = images_last(numbers(shape, -128, 127, 1).to(torch.int8))
        weight = numbers((outs, shape[1] if kernel else shape[-1], *kernel), -128, 127, 2)
        rest = numbers((outs,), -127, 128, 3) if affine else torch.zeros(outs, dtype=torch.long)

        count = {"none": 1, "table": STEPS, "sample": len(codes)}[zero]
        zeros = numbers((count,), -128, 127, 4)
        steps = torch.rand(count, generator=torch.Generator().manual_seed(5)) + 0.1
        scale, bias = torch.rand(2, outs, generator=torch.Generator().manual_seed(6)) + 0.1

        # What it gives, from integers in 64 bits.
        each = (-1, *[1] * (codes.dim() - 1))
        of_input = {"none": zeros[:1] * 0, "table": zeros[T : T + 1], "sample": zeros}[zero]
        step = steps[T : T + 1] if zero == "table" else steps
        axes = (-1, 1, 1) if kernel else (-1,)
        whole = weight + rest.reshape(-1, *[1] * (weight.dim() - 1))
        self.sums = integer_sums(codes, whole, of_input.reshape(each), self.window)
        self.output = (
            self.sums.double() * step.double().reshape(each) * scale.double().reshape(axes)
            + bias.double().reshape(axes)
        ).to(device)

        rows = weight.permute(0, 2, 3, 1).reshape(outs, -1) if kernel else weight
        tensors = (
            codes, rows.to(torch.int8).contiguous(), steps,
            None if zero == "none" else zeros.float(), torch.tensor(T) if count == STEPS else None,
            torch.zeros(1), scale, rows.sum(1, dtype=torch.int32), rest.int() if affine else None, bias,
        )  # fmt: skip
        self.arguments = [None if v is None else v.to(device) for v in tensors]

    def by_kernel(self, dtype: torch.dtype, tile: tuple[int, ...]) -> Tensor:
        """The kernel's answer, on any device."""
        from tdq_exp.quant.kernels import triton_integer

        codes = self.arguments[0]
        y = integer_operators.like_output(codes, len(self.arguments[1]), self.window, dtype)
        return triton_integer.product(*self.arguments, self.window, y, tile)


@devices
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_exact_and_outputs_within_float_rounding(name, zero, device):
    # Zero points of weights: with every zero point of the input, and in the first of them without.
    for affine in (True, False) if zero == "none" else (True,):
        case = Case(name, zero, affine, device)
        sums = case.by_kernel(torch.int32, tile(device))
        assert torch.equal(sums.cpu().long(), case.sums)
        if device != "cpu" and name not in ("3x3", "linear, tokens"):
            continue  # each takes a second to compile there
        y = case.by_kernel(torch.float32, tile(device))
        assert y.dtype == torch.float32 and y.shape == case.output.shape
        largest = float(case.output.abs().max())
        torch.testing.assert_close(y.double(), case.output, rtol=1e-6, atol=1e-6 * largest)


@devices
def test_without_a_zero_point_of_the_weights_the_border_is_still_the_byte_of_zero(device):
    case = Case("3x3", "table", False, device)
    assert torch.equal(case.by_kernel(torch.int32, tile(device)).cpu().long(), case.sums)


@devices
def test_a_broken_tensor_gives_no_number(device):
    case = Case("linear", "sample", True, device)
    sums = case.by_kernel(torch.int32, tile(device))
    case.arguments[5].fill_(torch.nan)
    assert bool(case.by_kernel(torch.float32, tile(device)).isnan().all())
    plain = integer_operators.product(*case.arguments, case.window, torch.float32, tile(device))
    assert bool(plain.isnan().all())
    assert torch.equal(case.by_kernel(torch.int32, tile(device)), sums)


@devices
def test_a_product_at_a_time_step_that_tables_do_not_hold_gives_no_number(device):
    for outside in (-1, STEPS):
        case = Case("linear", "table", True, device)
        case.arguments[4].fill_(outside)
        assert bool(case.by_kernel(torch.float32, tile(device)).isnan().all())


@devices
def test_the_largest_sum_fits(device):
    shape, most = (1, integer_operators.MOST_PRODUCTS), torch.int8
    codes = torch.full(shape, 127, dtype=most, device=device)
    weight = torch.full(shape, -128, dtype=most, device=device)
    one, zero = torch.ones(1, device=device), torch.tensor([-128.0], device=device)
    w_sum = weight.sum(1, dtype=torch.int32)
    rest = torch.tensor([-127], dtype=torch.int32, device=device)

    from tdq_exp.quant.kernels import triton_integer

    y = torch.empty(1, 1, dtype=torch.int32, device=device)
    wide = (16, 16, 1024, 4, 1) if device == "cpu" else integer_operators.TILES[0]
    triton_integer.product(
        codes, weight, one, zero, None, None, one, w_sum, rest, None, [], y, wide
    )
    assert int(y) == -255 * 255 * integer_operators.MOST_PRODUCTS


def tables(shift: int | None) -> tuple[Tensor, Tensor, int]:
    """(s, z, largest code) of bytes that are counted from zero, or not."""
    generator = torch.Generator().manual_seed(7)
    p = 127 if shift is None else 255
    s = torch.rand(STEPS, generator=generator) * 0.05 + 0.01
    return s, torch.randint(0, p + 1, (STEPS,), generator=generator).float(), p


@devices
@pytest.mark.parametrize("shift", [None, -128])
@pytest.mark.parametrize("source", ["table", "one", "sample"])
def test_bytes_are_the_quantizers_codes(source, shift, device):
    from tdq_exp.quant.kernels import triton_integer

    x = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(8)) * 2
    x[0, 0, :4] = torch.tensor([float("nan"), torch.inf, -torch.inf, 1e30])
    s, z, p = tables(shift)
    t = torch.tensor(T) if source == "table" else None
    if source != "table":
        s, z = (v[: 3 if source == "sample" else 1] for v in (s, z))

    step, zero = (v[T] if source == "table" else v.reshape(-1, 1, 1) for v in (s, z))
    q = ((x / step).round() + zero).clamp(0, p).nan_to_num(0)
    stored = q - zero if shift is None else q + shift
    arguments = [None if v is None else v.to(device) for v in (x, s, z, t)]
    found, broken = triton_integer.codes(*arguments, 0, p, shift)
    assert found.dtype == torch.int8 and torch.equal(found.cpu().float(), stored)
    plain, also = integer_operators.codes(x, s, z, t, 0, p, shift)
    assert torch.equal(plain.float(), stored)
    assert broken.shape == also.shape == (1,) and bool(broken.isnan()) and bool(also.isnan())

    # Nothing on a GPU can refuse a time step: one that they do not hold leaves no number.
    if t is not None:
        for outside in (-1, STEPS):
            there = torch.tensor(outside, device=device)
            finite = arguments[0].nan_to_num()
            of = (finite, *arguments[1:3], there, 0, p, shift)
            assert bool(triton_integer.codes(*of)[1].isnan())

    # Infinities are numbers; a step size that is none leaves no number.
    arguments[0][0, 0, 0] = 0.0
    of_numbers = [(arguments[1], False), (arguments[1] * torch.nan, True)]
    for changed, expected in (
        *of_numbers,
        (arguments[1] * torch.inf, True),
    ):  # of an infinite range
        of = (arguments[0], changed, *arguments[2:], 0, p, shift)
        for call in (triton_integer.codes, integer_operators.codes):
            assert bool(call(*of)[1].isnan()) is expected


@devices
@pytest.mark.parametrize(
    ("shape", "groups"),
    # The last one has more partial sums in a group than are read at once.
    [((2, 6, 5, 9), 3), ((1, 70, 2, 2), 7), ((3, 4, 1, 1), 1), ((1, 8, 40, 41), 1)],
)
def test_a_norm_gives_the_codes_of_its_output(shape, groups, device):
    from tdq_exp.quant.kernels import triton_integer

    generator = torch.Generator().manual_seed(9)
    x = images_last(torch.randn(shape, generator=generator) * 3 + 20)
    x[:, 0] *= 100  # channels of very different size within a group
    weight, bias = torch.randn(2, shape[1], generator=generator)
    s, z, p = tables(-128)
    t = torch.tensor(T)
    for silu in (True, False):
        y = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
        v = (F.silu(y) if silu else y) / s[T].double() + z[T]
        arguments = [v.to(device) for v in (x, weight, bias)]
        of_table = (*(v.to(device) for v in (s, z, t)), 0, p, -128)
        found, broken = triton_integer.norm_codes(*arguments, groups, 1e-6, silu, *of_table)
        assert float(broken) == 0
        assert found.is_contiguous(memory_format=torch.channels_last)
        codes, expected = found.cpu().double() + 128, v.round().clamp(0, p)
        border = ((v - v.floor()) - 0.5).abs() < 1e-2
        assert torch.equal(codes[~border], expected[~border])
        assert ((codes - expected).abs() <= 1).all()

    arguments[0][-1, 0, -1, -1] = torch.nan
    for call in (triton_integer.norm_codes, integer_operators.norm_codes):
        assert bool(call(*arguments, groups, 1e-6, silu, *of_table)[1].isnan())


@devices
def test_bytes_of_bfloat16_are_those_of_the_same_numbers(device):
    from tdq_exp.quant.kernels import triton_integer

    generator = torch.Generator().manual_seed(8)
    x = images_last((torch.randn(2, 6, 5, 9, generator=generator) * 2).bfloat16()).to(device)
    s, z, p = (v.to(device) if isinstance(v, Tensor) else v for v in tables(-128))
    norm = (torch.ones(6, device=device), torch.zeros(6, device=device), 3, 1e-6, True)
    of_table = (s, z, torch.tensor(T, device=device), 0, p, -128)
    for call, arguments, most in (
        (triton_integer.codes, of_table, 0),
        (triton_integer.norm_codes, (*norm, *of_table), 1),  # a GPU may add in another order
    ):
        found, expected = (call(v, *arguments)[0].int() for v in (x, x.float()))
        apart = (found - expected).abs()
        assert int(apart.max()) <= most and float(apart.float().mean()) < 0.01


@devices
def test_a_repeated_norm_gives_the_same_bytes(device):
    from tdq_exp.quant.kernels import triton_integer

    generator = torch.Generator().manual_seed(9)
    x = images_last(torch.randn(1, 64, 8, 9, generator=generator)).to(device)
    s, z = torch.tensor([0.01], device=device), torch.tensor([100.0], device=device)
    norm = (torch.ones(64, device=device), torch.zeros(64, device=device), 4, 1e-6, True)
    runs = [triton_integer.norm_codes(x, *norm, s, z, None, 0, 255, -128)[0] for _ in range(2)]
    assert torch.equal(*runs)


@devices
def test_functions_and_operators_call_the_kernels(device, monkeypatch):
    monkeypatch.setattr(integer_operators, "by_triton", lambda x: True)
    s, z, p = (v.to(device) if isinstance(v, Tensor) else v for v in tables(-128))
    t = torch.tensor(T, device=device)
    generator = torch.Generator().manual_seed(10)
    x = images_last(torch.randn(1, 4, 3, 3, generator=generator)).to(device)
    norm = (torch.ones(4, device=device), torch.zeros(4, device=device), 2, 1e-6, True)
    case = Case("linear, one number", "table", True, device)
    calls = [
        (integer_operators.codes, integer_operators.codes_operator, (x, s, z, t, 0, p, -128)),
        (
            integer_operators.norm_codes,
            integer_operators.norm_codes_operator,
            (x, *norm, s, z, t, 0, p, -128),
        ),
        (
            integer_operators.product,
            integer_operators.product_operator,
            (*case.arguments, case.window, torch.int32, list(tile(device))),
        ),
    ]
    found = [(call(*arguments), operator(*arguments)) for call, operator, arguments in calls]
    monkeypatch.setattr(integer_operators, "by_triton", lambda x: False)
    for both, (call, _, arguments) in zip(found, calls, strict=True):
        answers = [one if isinstance(one, tuple) else (one,) for one in (*both, call(*arguments))]
        for direct, operated, plain in zip(*answers, strict=True):
            assert torch.equal(direct, operated) and torch.equal(direct, plain)


@devices
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 6), (4, 6)])
def test_a_linear_layer_reads_its_input_in_the_order_of_its_axes(shape, device, monkeypatch):
    """An image's layout would give it channels of another axis."""
    monkeypatch.setattr(integer_operators, "by_triton", lambda x: True)
    monkeypatch.setattr(integer_operators, "default_tile", lambda rows, outs: tile(device))
    time = TimeContext(STEPS)
    quantizer = Lsq(
        Grid(4, symmetric=False),
        LookupTable(torch.full((STEPS,), 0.2), time),
        TableZeroPoint(torch.full((STEPS,), 7.0), time),
    ).eval()
    weight = CodedWeight(numbers((5, 6), -7, 7, 11).to(torch.int8), torch.tensor(0.05))
    layer = QuantLinear(nn.Linear(6, 5), weight, quantizer).to(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(12)).to(device)
    with torch.no_grad(), products("float32"), time.at(torch.tensor(T, device=device)):
        found = gpu.GpuLayer(layer, gpu.gpu_coder_of(quantizer))(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


# What needs neither.


@pytest.mark.parametrize("zero", ZEROS)
def test_single_operations_on_a_cpu_give_the_same_integers(zero):
    for name in SHAPES:
        case = Case(name, zero, True, "cpu")
        sums = integer_operators.product(*case.arguments, case.window, torch.int32, [])
        assert torch.equal(sums.long(), case.sums)


def test_operators_know_shapes_types_and_layouts_without_memory():
    case = Case("3x3, stride 2, even", "table", True, "cpu")
    real = integer_operators.product(*case.arguments, case.window, torch.float32, [])
    s, z, p = tables(-128)
    x = images_last(torch.randn(2, 6, 5, 9))
    norm = (torch.ones(6), torch.zeros(6), 3, 1e-6, True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [None if v is None else mode.from_tensor(v) for v in case.arguments]
        fake = integer_operators.product(*fakes, case.window, torch.float32, [])
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())

        fake_x = mode.from_tensor(x)
        for found, broken in (
            integer_operators.codes(fake_x, s, z, None, 0, p, -128),
            integer_operators.norm_codes(fake_x, *norm, s, z, None, 0, p, -128),
        ):
            assert (broken.shape, broken.dtype) == ((1,), torch.float32)
            assert (found.shape, found.dtype, found.stride()) == (x.shape, torch.int8, x.stride())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_the_compiler_makes_products_of_bytes_of_it(capability, product, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tdq_exp.quant.kernels import triton_integer

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_integer._product
    rows, outs, channels, warps, stages = integer_operators.TILES[0]
    constants = {
        "KERNEL_Y": 3, "KERNEL_X": 3, "S_STEP": 1, "Z_STEP": 1, "TABLE": True, "CHECKED": True,
        "HAS_Z": True, "AFFINE": True, "HAS_BIAS": True, "SUMS": False, "ROWS": rows, "OUTS": outs,
        "CHANNELS": channels,
    }  # fmt: skip
    pointers = {
        "codes": "*i8", "weight": "*i8", "y": "*bf16", "s": "*fp32", "z": "*fp32", "t": "*i64",
        "broken": "*fp32", "w_scale": "*fp32", "w_sum": "*i32", "rest": "*i32", "bias": "*fp32",
    }  # fmt: skip
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = ("codes", "weight", "y", "channels", "outs")
    source = ASTSource(
        kernel, types, {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    # Products of signed bytes, added in 32 bits; and pieces of 16 bytes copied ahead of them.
    assert re.search(rf"{product}\S*\.s32\.s8\.s8", made.asm["ptx"])
    assert "cp.async.cg.shared.global" in made.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has taken the compiler's place")
def test_the_compiler_takes_the_kernels_of_bytes(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tdq_exp.quant.kernels import triton_integer

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "S_STEP": 1, "Z_STEP": 1, "TABLE": True, "CENTRED": False, "SILU": True,
        "PIXELS": triton_integer.PIXELS, "BLOCK": triton_integer.NORM_CHANNELS,
    }  # fmt: skip
    floats = dict.fromkeys(("n", "p", "shift"), "fp32")
    pointers = {"y": "*i8", "t": "*i64"} | dict.fromkeys(
        ("x", "s", "z", "broken", "moments", "weight", "bias"), "*fp32"
    )
    for kernel in (triton_integer._codes, triton_integer._norm_codes):
        names = kernel.arg_names
        fixed = {name: value for name, value in constants.items() if name in names}
        types = {n: "constexpr" if n in fixed else (pointers | floats).get(n, "i32") for n in names}
        source = ASTSource(kernel, types, {(names.index(n),): v for n, v in fixed.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "st.global" in made.asm["ptx"] and "atom" not in made.asm["ptx"]


@pytest.mark.gpu
def test_many_pixels_and_channels_in_every_type():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (8, 96, 32, 32), generator=generator)
    weight = torch.randint(-128, 128, (130, 96, 3, 3), generator=generator)
    window = [3, 3, 1, 1, 1, 1, 1, 1]
    sums = F.conv2d(codes.double().cuda(), weight.double().cuda(), padding=1)
    rows = weight.permute(0, 2, 3, 1).reshape(130, -1).to(torch.int8).cuda()
    one = torch.ones(1, device="cuda")
    scale = torch.full((130,), 1e-4, device="cuda")
    images = images_last(codes.to(torch.int8)).cuda()
    rest = (images, rows, one, None, None, None, scale, rows.sum(1, dtype=torch.int32), None, None)
    for one_tile in (*integer_operators.TILES, ()):
        found = integer_operators.product(*rest, window, torch.int32, list(one_tile))
        assert torch.equal(found.double(), sums)
        y = integer_operators.product(*rest, window, torch.float32, list(one_tile))
        half = integer_operators.product(*rest, window, torch.bfloat16, list(one_tile))
        torch.testing.assert_close(y.double(), sums * 1e-4, rtol=1e-6, atol=1e-6)
        assert torch.equal(half, y.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 3])
@pytest.mark.parametrize("zero", ZEROS)
def test_every_tile_is_exact_with_zero_points(zero, channels):
    codes = numbers((8, channels, 32, 32), -128, 127, 1).cuda()
    weight = numbers((130, channels, 3, 3), -128, 127, 2).cuda()
    rest = numbers((130,), -127, 128, 3).cuda()
    zeros = numbers(({"none": 1, "table": STEPS, "sample": 8}[zero],), -128, 127, 4).cuda()
    t = torch.tensor(T).cuda() if zero == "table" else None

    # In double precision, which holds such sums.
    of_input = {"none": zeros * 0, "table": zeros[T : T + 1], "sample": zeros}[zero]
    from_zero = (codes - of_input.reshape(-1, 1, 1, 1)).double()
    sums = F.conv2d(from_zero, (weight + rest.reshape(-1, 1, 1, 1)).double(), padding=1)

    rows = weight.permute(0, 2, 3, 1).reshape(130, -1).to(torch.int8).contiguous()
    one, scale = torch.ones(1, device="cuda"), torch.ones(130, device="cuda")
    z = None if zero == "none" else zeros.float()
    arguments = (
        images_last(codes.to(torch.int8)), rows, one, z, t, None, scale,
        rows.sum(1, dtype=torch.int32), rest.int(), None, [3, 3, 1, 1, 1, 1, 1, 1], torch.int32,
    )  # fmt: skip
    for one_tile in (*integer_operators.TILES, ()):
        assert torch.equal(integer_operators.product(*arguments, list(one_tile)).double(), sums), (
            one_tile
        )
