"""DDIM's update (Song et al. 2021, eq. 12 and 16) for one pixel, from betas in plain Python numbers."""

import math


def alpha_bar(betas: list[float], t: int) -> float:
    """The product of 1 - beta up to and including t; 1 for t = -1."""
    product = 1.0
    for i in range(t + 1):
        product *= 1.0 - betas[i]
    return product


def step(
    x: float,
    eps: float,
    abar: float,
    abar_prev: float,
    eta: float = 0.0,
    z: float = 0.0,
    clip: bool = False,
) -> float:
    """x_{t_prev} from x_t.

    Args:
        x: x_t.
        eps: predicted noise.
        abar, abar_prev: at t and t_prev.
        eta: 0 is deterministic.
        z: standard normal, for eta > 0.
        clip: limit the predicted x_0 to [-1, 1], and take the noise that goes with the limited one.
    """
    x_0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    if clip:
        x_0 = min(1.0, max(-1.0, x_0))
        eps = (x - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
    return math.sqrt(abar_prev) * x_0 + math.sqrt(1 - abar_prev - sigma**2) * eps + sigma * z
