"""Fused kernels for fake quantization on a GPU, in Triton. Formulas: see `ops`.

As in `cpu.c`, a tensor is `rows` rows of `width` numbers that lie one after another; step size
and zero point are one for all rows or one for each. Where both are one for all, the whole tensor is
a single row.

- x, x_hat and the gradients are float32 or bfloat16 in memory; all arithmetic is in float32.
- Division is exactly rounded, as in `ops` (Triton's `/` is not).
- Rounding is half to even, by adding and taking away 1.5 * 2^23: codes are far smaller than 2^22.
- Gradients of s and z are sums in two stages: one partial sum for each block of numbers, then a sum
  over the blocks in their order, in float64. Nothing is added atomically, so a repeated run gives
  the same bits.
- Nothing waits for the GPU, and nothing depends on values that are there: the kernels can be
  captured in a CUDA graph. In eval, s and z are read from tables over t inside the kernel, at a
  time step that is itself a number on the GPU.

With `TRITON_INTERPRET=1` the same functions run on CPU tensors, slowly: that is how they are tested
without a GPU.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdq_exp.quant.kernels.plain import KINDS

FORWARD_BLOCK = 1024  # numbers per program
BACKWARD_BLOCK = 4096  # likewise: larger, so that there are fewer partial sums
SUM_BLOCK = 1024  # partial sums that are read at once


@triton.jit
def _round(v):
    """Return v rounded half to even, for |v| < 2^22; a NaN stays one."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _clip(v, low, high):
    """Return v clipped to low..high. Unlike minimum and maximum, this lets a NaN pass."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def _entry(t, steps):
    """Return (index of time t in a table of `steps` entries, value to add to the step size).

    A kernel can't raise an error for a t outside of the table: the value is then NaN, else 0.
    """
    entry = tl.load(t).to(tl.int64)
    known = (entry >= 0) & (entry < steps)
    return tl.where(known, entry, 0), tl.where(known, 0.0, float("nan"))


@triton.jit
def _place(s, t, row, steps, S_STEP: tl.constexpr, TABLE: tl.constexpr):
    """Return (where s and z of a row are, its step size); with TABLE they are those of time t."""
    if TABLE:
        entry, missing = _entry(t, steps)
        step = tl.load(s + entry * S_STEP).to(tl.float32) + missing
    else:
        entry = row
        step = tl.load(s + entry * S_STEP).to(tl.float32)
    return entry, step


@triton.jit
def _zero_point(z, index, HAS_Z: tl.constexpr):
    if HAS_Z:
        return tl.load(z + index).to(tl.float32)
    else:
        return 0.0


@triton.jit(do_not_specialize=["blocks", "steps"], do_not_specialize_on_alignment=["s", "z", "t"])
def _forward(
    x, u, x_hat, s, z, t,
    width, blocks, steps, n, p,
    S_STEP: tl.constexpr, Z_STEP: tl.constexpr, HAS_Z: tl.constexpr, NOISE: tl.constexpr,
    TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store x_hat of one block of one row.

    S_STEP and Z_STEP are 1 where each row has its own s or z, or, with TABLE, each time step;
    there are `steps` of them.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column

    entry, step = _place(s, t, row, steps, S_STEP, TABLE)
    zero = _zero_point(z, entry * Z_STEP, HAS_Z)
    low = n - zero
    high = p - zero

    v = tl.math.div_rn(tl.load(x + at, mask, 0.0).to(tl.float32), step)
    bounded = _clip(v, low, high)
    if NOISE:
        noise = tl.load(u + at, mask, 0.0).to(tl.float32)
        value = tl.where((v > low) & (v < high), v + noise, bounded)
    else:
        value = _round(bounded)
    tl.store(x_hat + at, (value * step).to(x_hat.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["s", "z"])
def _backward(
    g, x, u, g_x, partial, s, z,
    width, blocks, n, p,
    S_STEP: tl.constexpr, Z_STEP: tl.constexpr, HAS_Z: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store g_x = m g of one block of one row, and its share of the two sums: g e, and (1 - m) g.

    e is d x_hat / d s: outside of the range the bound that was hit, inside what KIND says.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column

    step = tl.load(s + row * S_STEP).to(tl.float32)
    zero = _zero_point(z, row * Z_STEP, HAS_Z)
    low = n - zero
    high = p - zero

    gradient = tl.load(g + at, mask, 0.0).to(tl.float32)
    v = tl.math.div_rn(tl.load(x + at, mask, 0.0).to(tl.float32), step)
    inside = (v > low) & (v < high)
    bounded = _clip(v, low, high)
    if KIND == 0:
        error = _round(bounded) - v
    elif KIND == 1:
        error = tl.zeros([BLOCK], tl.float32)
    else:
        error = tl.load(u + at, mask, 0.0).to(tl.float32)
    tl.store(g_x + at, tl.where(inside, gradient, 0.0).to(g_x.dtype.element_ty), mask)

    # Outside of the row g is 0, and so are both terms.
    tl.store(partial + 2 * program, tl.sum(gradient * tl.where(inside, error, bounded)))
    tl.store(partial + 2 * program + 1, tl.sum(tl.where(inside, 0.0, gradient)))


@triton.jit(
    do_not_specialize=["rows", "blocks", "rowwise"],
    do_not_specialize_on_alignment=["partial", "g_s", "g_z", "s"],
)
def _finish(
    partial, g_s, g_z, s,
    rows, blocks, rowwise, scale,
    S_STEP: tl.constexpr, Z_STEP: tl.constexpr, HAS_Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finish the sums, as the second stage: g_s = scale sum g e, g_z = -sum s (1 - m) g.

    Program i < rowwise sums the blocks of row i; the program after them sums all blocks, for what
    is one for all rows.
    """
    program = tl.program_id(0)
    whole = program == rowwise
    first = tl.where(whole, 0, program * blocks)
    count = tl.where(whole, rows * blocks, blocks)

    errors = tl.zeros([BLOCK], tl.float64)
    outsides = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        block = first + index
        step = tl.load(s + (block // blocks) * S_STEP, mask, 0.0).to(tl.float64)
        errors += tl.load(partial + 2 * block, mask, 0.0).to(tl.float64)
        outsides -= tl.load(partial + 2 * block + 1, mask, 0.0).to(tl.float64) * step
        start += BLOCK
    error = (tl.sum(errors) * scale).to(tl.float32)
    outside = tl.sum(outsides).to(tl.float32)

    if whole:
        if S_STEP == 0:
            tl.store(g_s, error)
        if HAS_Z and Z_STEP == 0:
            tl.store(g_z, outside)
    else:
        if S_STEP == 1:
            tl.store(g_s + program, error)
        if HAS_Z and Z_STEP == 1:
            tl.store(g_z + program, outside)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["x", "g", "g_x"])
def _round_backward(x, g, g_x, size, n, p, BLOCK: tl.constexpr):
    """Store the gradient of `ops.round_straight_through`, in place of eight small operations."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(x + at, mask, 0.0)
    gradient = tl.load(g + at, mask, 0.0)
    outwards = ((value < n) & (gradient > 0)) | ((value > p) & (gradient < 0))
    tl.store(g_x + at, tl.where(outwards, 0.0, gradient), mask)


def _step(value: Tensor | None) -> int:
    return int(value is not None and value.numel() > 1)


def _steps(s: Tensor, z: Tensor | None) -> int:
    """Return how many time steps a pair of tables holds: any, if both have one entry."""
    longest = max(s.numel(), 1 if z is None else z.numel())
    return longest if longest > 1 else 2**31 - 1


def _rows(x: Tensor, s: Tensor, z: Tensor | None) -> tuple[int, int]:
    """Return (rows, width); a tensor with one s and one z is a single row."""
    rows = len(x) if _step(s) or _step(z) else 1
    return rows, x.numel() // rows


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one within the block: Triton launches there."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def forward(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x_hat.

    Args:
        x: float32 or bfloat16; its rows lie one after another.
        s, z: float32, of one element or one for each row; z = None is 0.
        n, p: smallest and largest code.
        noise: u, in the layout of x.
        dtype: of x_hat.
    """
    rows, width = _rows(x, s, z)
    s, z = s.contiguous(), None if z is None else z.contiguous()
    x_hat = torch.empty_like(x, dtype=dtype)
    blocks = -(-width // FORWARD_BLOCK)
    with _on_device(x):
        _forward[(rows * blocks,)](
            x, x if noise is None else noise, x_hat, s, s if z is None else z, s,
            width, blocks, _steps(s, z), float(n), float(p),
            _step(s), _step(z), z is not None, noise is not None, False, FORWARD_BLOCK,
        )  # fmt: skip
    return x_hat


def forward_at(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    t: Tensor,
    n: int,
    p: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x_hat with s and z read from tables at a time step that is on the GPU.

    Args:
        s, z: `[T]` or `[1]`, float32; z = None is 0.
        t: 0-dim, integer, on x's device; x_hat is NaN if the tables do not hold it. The rest as in
            `forward`.
    """
    s, z = s.contiguous(), None if z is None else z.contiguous()
    x_hat = torch.empty_like(x, dtype=dtype)
    blocks = -(-x.numel() // FORWARD_BLOCK)
    with _on_device(x):
        _forward[(blocks,)](
            x, x, x_hat, s, s if z is None else z, t,
            x.numel(), blocks, _steps(s, z), float(n), float(p),
            _step(s), _step(z), z is not None, False, True, FORWARD_BLOCK,
        )  # fmt: skip
    return x_hat


def backward(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (g_x, g_s times scale, g_z), of the shapes of x, s and z; g and noise laid out as x.

    Args:
        g: the gradient of x_hat, float32 or bfloat16.
        scale: multiplies the gradient of s.
        kind: `learned`, `clipped` or `noise`. The rest as in `forward`.
    """
    rows, width = _rows(x, s, z)
    s, z = s.contiguous(), None if z is None else z.contiguous()
    g_x, g_s = torch.empty_like(x), torch.empty_like(s)
    g_z = None if z is None else torch.empty_like(z)

    blocks = -(-width // BACKWARD_BLOCK)
    partial = torch.empty(2 * rows * blocks, dtype=torch.float32, device=x.device)
    rowwise = rows if _step(s) or _step(z) else 0
    whole = not _step(s) or (z is not None and not _step(z))
    with _on_device(x):
        _backward[(rows * blocks,)](
            g, x, x if noise is None else noise, g_x, partial, s, s if z is None else z,
            width, blocks, float(n), float(p),
            _step(s), _step(z), z is not None, KINDS[kind], BACKWARD_BLOCK, num_warps=8,
        )  # fmt: skip
        _finish[(rowwise + whole,)](
            partial, g_s, g_s if g_z is None else g_z, s,
            rows, blocks, rowwise, float(scale),
            _step(s), _step(z), z is not None, SUM_BLOCK,
        )  # fmt: skip
    return g_x, g_s, g_z


def round_backward(x: Tensor, g: Tensor, n: float, p: float) -> Tensor:
    """Return g, but 0 where x is beyond n or p and a descent step would move it further away."""
    x, g = x.contiguous(), g.contiguous()
    g_x, size = torch.empty_like(g), x.numel()
    with _on_device(x):
        _round_backward[(-(-size // FORWARD_BLOCK),)](
            x, g, g_x, size, float(n), float(p), FORWARD_BLOCK
        )
    return g_x
