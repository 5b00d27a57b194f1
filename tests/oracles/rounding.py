"""Fake quantization one number at a time, in double precision, straight from the definitions.

x_bar = clip(round(x / s) + z, n, p),   x_hat = s (x_bar - z)

Each `*_terms` gives (x_hat, d x_hat / d x, d x_hat / d s, d x_hat / d z) of one element; `over_tensor` applies it to a
tensor and adds up what belongs to one step size or zero point.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Terms = tuple[float, float, float, float]


def clip(value: float, low: float, high: float) -> float:
    """`value`, no smaller than `low` and no larger than `high`."""
    if value < low:
        return low
    if value > high:
        return high
    return value


def code(x: float, s: float, z: int, n: int, p: int) -> int:
    """x_bar; halves go to the even neighbour, as in IEEE 754."""
    return int(clip(round(x / s) + z, n, p))


def fake_quantize(x: float, s: float, z: int, n: int, p: int) -> float:
    """x_hat."""
    return s * (code(x, s, z, n, p) - z)


def lsq_terms(x: float, s: float, z: int, n: int, p: int, u: float = 0.0) -> Terms:
    """LSQ (arXiv 1902.08153), eq. (2), (3) and (5), with -Q_N = n - z and Q_P = p - z; the offset as in LSQ+, eq. (6)."""
    v, x_hat = x / s, fake_quantize(x, s, z, n, p)
    if v <= n - z:
        return x_hat, 0.0, n - z, -s
    if v >= p - z:
        return x_hat, 0.0, p - z, -s
    return x_hat, 1.0, -v + round(v), 0.0


def pact_terms(x: float, s: float, z: int, n: int, p: int, u: float = 0.0) -> Terms:
    """PACT (arXiv 1805.06085), eq. (3), on either side: only a clipped element teaches its bound, s (p - z) or s (n - z)."""
    x_hat = fake_quantize(x, s, z, n, p)
    alpha, beta = s * (p - z), s * (n - z)
    if x >= alpha:
        return x_hat, 0.0, p - z, -s
    if x <= beta:
        return x_hat, 0.0, n - z, -s
    return x_hat, 1.0, 0.0, 0.0


def nipq_terms(x: float, s: float, z: int, n: int, p: int, u: float = 0.0) -> Terms:
    """NIPQ: noise of a step's width inside of the bounds, the bound itself outside."""
    alpha, beta = s * (p - z), s * (n - z)
    if x >= alpha:
        return alpha, 0.0, p - z, -s
    if x <= beta:
        return beta, 0.0, n - z, -s
    return x + s * u, 1.0, u, 0.0


def over_tensor(
    terms: Callable[..., Terms],
    x: Tensor,
    s: Tensor,
    z: Tensor,
    n: int,
    p: int,
    g: Tensor,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_hat and the gradients of x, s and z for the incoming gradient g, all float64.

    Args:
        terms: of one element.
        x: `[B, ...]`.
        s, z: one value, or one for each of the B samples.
        g: of x's shape.
        u: noise of x's shape.
    """
    x_hat, g_x = (
        torch.zeros(x.shape, dtype=torch.float64),
        torch.zeros(x.shape, dtype=torch.float64),
    )
    g_s, g_z = (
        torch.zeros(s.numel(), dtype=torch.float64),
        torch.zeros(z.numel(), dtype=torch.float64),
    )
    steps, zeros = s.detach().reshape(-1), z.detach().reshape(-1)
    samples = range(len(x))
    for b in samples:
        i, j = (b if len(steps) > 1 else 0), (b if len(zeros) > 1 else 0)
        s_b, z_b = float(steps[i]), int(zeros[j])
        rows = (
            x[b].detach().reshape(-1),
            g[b].reshape(-1),
            None if u is None else u[b].reshape(-1),
        )
        for k in range(x[b].numel()):
            noise = 0.0 if rows[2] is None else float(rows[2][k])
            value, by_x, by_s, by_z = terms(float(rows[0][k]), s_b, z_b, n, p, noise)
            incoming = float(rows[1][k])
            x_hat[b].view(-1)[k] = value
            g_x[b].view(-1)[k] = incoming * by_x
            g_s[i] += incoming * by_s
            g_z[j] += incoming * by_z
    return x_hat, g_x, g_s.reshape(s.shape), g_z.reshape(z.shape)


def mean_squared_error(values: list[float], s: float, z: int, n: int, p: int) -> float:
    """`mean (x_hat - x)^2`, added up one by one."""
    return sum((fake_quantize(x, s, z, n, p) - x) ** 2 for x in values) / len(values)
