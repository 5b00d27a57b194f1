"""The fused kernels against the same arithmetic as single tensor operations; their gradients are in `test_gradients`."""

from __future__ import annotations

import pytest
import torch

from tdq_exp.quant import ops
from tdq_exp.quant.kernels import cpu as kernels
from tdq_exp.quant.kernels import unfused
from tests.quant.builders import randn


def cases():
    """(name, x, s, z): every layout and every way in which s and z can belong to rows."""
    x = randn(6, 5, 7, 8, seed=1) * 2
    one, each = (
        torch.tensor(0.31),
        torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.1,
    )
    zeros = torch.randint(0, 15, (6, 1, 1, 1), generator=torch.Generator().manual_seed(3)).float()
    yield "static", x, one, torch.tensor(4.0)
    yield "static symmetric", x, one, None
    yield "per sample", x, each, zeros
    yield "per sample, one z", x, each, torch.tensor(7.0)
    yield "channels last", x.to(memory_format=torch.channels_last), each, zeros
    yield (
        "transposed",
        x.reshape(6, 5, 56).transpose(1, 2),
        each.reshape(6, 1, 1),
        zeros.reshape(6, 1, 1),
    )
    yield "slice", x[:, 1:4, ::2], each, zeros
    yield "one row", x[:1], each[:1], zeros[:1]
    yield "vectors", x.reshape(-1, 8), one, torch.tensor(4.0)
    yield "long rows", randn(3, 20000, seed=4), each[:3].reshape(3, 1), zeros[:3].reshape(3, 1)


CASES = {name: case for name, *case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_input_are_the_same_bits(name):
    x, s, z = CASES[name]
    assert kernels.fit(x, s, z)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def run():
        inputs = [
            x.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
            s.clone().requires_grad_(),
        ]
        inputs += [] if z is None else [z.clone().requires_grad_()]
        x_hat = ops.fake_quantize_learned(
            inputs[0], inputs[1], inputs[2] if z is not None else None, 0, 15, 0.5
        )
        return ops.fake_quantize(x, s, z, 0, 15), x_hat, *torch.autograd.grad(x_hat, inputs, g)

    fused = run()
    with unfused():
        single = run()
    assert all(torch.equal(a, b) for a, b in zip(fused[:3], single[:3], strict=True))
    for a, b in zip(fused[3:], single[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-3)


def test_the_layout_stays():
    x = CASES["channels last"][0]
    assert ops.fake_quantize(x, torch.tensor(0.3), None, -7, 7).is_contiguous(
        memory_format=torch.channels_last
    )


def test_sums_are_the_same_bits_for_any_number_of_threads():
    x, g = randn(7, 9000, seed=6), randn(7, 9000, seed=7)
    s, z = torch.tensor(0.2), torch.tensor(5.0)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kernels.backward(g, x, s, z, 0, 15, 0.7, "learned", None))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_a_nan_stays_one():
    x = torch.tensor([[0.3, float("nan"), 1e30, -float("inf")]])
    found = ops.fake_quantize(x, torch.tensor(0.5), torch.tensor(2.0), 0, 15)
    assert found[0, 1].isnan() and found[0, [0, 2, 3]].tolist() == [0.5, 6.5, -1.0]


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(()), torch.zeros(0, 3)]
)
def test_other_types_and_shapes_are_left_to_tensor_operations(x):
    assert not kernels.fit(x, torch.tensor(0.5), None)
    assert ops.fake_quantize(x, torch.tensor(0.5, dtype=x.dtype), None, -7, 7).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_step_sizes_of_another_type_are_read_as_what_they_are(shape, dtype):
    """An interval of somebody's own may give any type; the kernels read float32."""
    x, s, z = randn(4, 9), torch.full(shape, 2.0), torch.full(shape, 3.0)
    expected = ops.fake_quantize(x, s, z, 0, 15)
    codes, _ = kernels.codes(x, s.reshape(-1), z.reshape(-1), 0, 15)
    for changed in ((s.to(dtype), z), (s, z.to(dtype)), (s.to(dtype), z.to(dtype))):
        assert torch.equal(ops.fake_quantize(x, *changed, 0, 15).float(), expected)
        assert torch.equal(ops.fake_quantize_learned(x, *changed, 0, 15).float(), expected)
        assert torch.equal(kernels.codes(x, *(v.reshape(-1) for v in changed), 0, 15)[0], codes)


def test_without_a_compiler_the_reason_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.sysconfig, "get_config_var", lambda name: str(tmp_path / "none"))
    reason = kernels.library.__wrapped__()
    assert "none" in reason and "No such file" in reason
