"""How far the Frechet distance of a set may be off, from halves of the set.

A half drawn without replacement varies around the whole set as the whole set varies around the
model: Var = S^2 / (N/2) (1 - 1/2) = S^2 / N for a mean, and likewise for smooth functions of means.
The distances of halves are all larger than that of the whole set (the bias falls as 1/N), so it is
their deviation that is used, not their mean.

References:
    Politis, Romano and Wolf, "Subsampling", Springer 1999.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdq_exp.diffusion.draws import BareSeed, bare_generator

FEWEST = 4  # images: a half of fewer has no covariance
DRAWS = 20
SEED = 2020


def deviation_of_frechet(
    generated: Tensor, reference: Tensor, draws: int = DRAWS, seed: int = SEED
) -> dict[str, Any]:
    """Return the standard deviation of the Frechet distance over halves of the generated set.

    With R = Sigma_r^(1/2), the trace of (Sigma_g Sigma_r)^(1/2) is the sum of the roots of the
    eigenvalues of R Sigma_g R, which is symmetric: R is computed once for all halves.

    Args:
        generated: `[N, D]`, N >= `FEWEST`.
        reference: `[M, D]`, M >= 2.
        draws: number of halves.
        seed: of the draws.

    Returns:
        `fid`, the deviation; `draws`.
    """
    generated, reference = generated.cpu().double(), reference.cpu().double()
    mean, covariance = reference.mean(0), torch.atleast_2d(torch.cov(reference.T))

    # The root of the reference's covariance.
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    total = float(covariance.trace())

    stream = bare_generator(BareSeed.HALF_SAMPLING, seed)
    distances = []
    for _ in range(draws):
        half = generated[torch.randperm(len(generated), generator=stream)[: len(generated) // 2]]
        sigma = torch.atleast_2d(torch.cov(half.T))

        product = torch.linalg.eigvalsh(root @ sigma @ root).clamp(min=0)
        between = float((half.mean(0) - mean).square().sum())
        distances.append(between + total + float(sigma.trace()) - 2 * float(product.sqrt().sum()))

    return {"fid": float(torch.tensor(distances, dtype=torch.float64).std()), "draws": draws}
