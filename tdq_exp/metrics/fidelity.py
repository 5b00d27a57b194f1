"""Distances between generated and reference images, from their feature vectors.

With f_i in R^D the features of one set, mu = mean(f) and Sigma = cov(f):

    FID  = |mu_g - mu_r|^2 + Tr(Sigma_g + Sigma_r - 2 (Sigma_g Sigma_r)^(1/2))
    IS   = exp(E_x KL(p(y | x) || p(y)))
    KID  = MMD^2, unbiased, with k(f, f') = (f . f' / D + 1)^3
    precision (recall) = share of generated (real) vectors that lie within the third-neighbour ball
                         of a real (generated) one

IS has a mean and a deviation over `splits` parts of the set, KID over `subsets` draws from it.

The formulas are evaluated by torch-fidelity; its defaults and its seed are the defaults here.

FID is biased upwards by an amount that falls as 1/N and depends on the model: compare equal N only.
With N <= D the covariance has rank N - 1 at most. That is legal, the trace of the square root is
still defined, but the bias is large. KID has no such bias.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium", NIPS 2017 (FID);
    Salimans et al., "Improved Techniques for Training GANs", NIPS 2016 (IS);
    Binkowski et al., "Demystifying MMD GANs", ICLR 2018 (KID);
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
        NeurIPS 2019;
    Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR
        2020 (the bias).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

# torch-fidelity's default seed, of KID's draws and of the shuffle before IS.
SEED = 2020
# The third-nearest neighbour is the one that torch-fidelity and the paper of precision and recall
# take.
NEIGHBOUR = 3
# Distances are computed this many rows at a time, so that 50,000 images need 2 GB and not 10.
_PRC_ROWS = 10_000


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: float64 [D].
        sigma: float64 [D, D], unbiased (divided by N - 1).
        n: The number of images N.
        features: Which features these are, as free text such as "digits/pool/<hash>"; empty if
            unknown.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int
    features: str = ""

    @classmethod
    def of(cls, vectors: torch.Tensor, features: str = "") -> "Statistics":
        """Compute the statistics of feature vectors.

        Args:
            vectors: [N, D], N >= 2.
            features: Which features these are.

        Raises:
            ValueError: Fewer than two vectors, or one that is not finite.
        """
        _check(vectors, 2, "fid")
        # In float64 from the start: torch-fidelity keeps the mean in the dtype that it is given.
        moments = fid_features_to_statistics(vectors.cpu().double())
        return cls(moments["mu"], np.atleast_2d(moments["sigma"]), len(vectors), features)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""Compute the squared Frechet distance between two Gaussians.

        |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    The trace of the root is the sum of the roots of the eigenvalues of S_a S_b. Rounding may leave
    a distance of zero slightly negative.

    Args:
        a: One set.
        b: The other.

    Raises:
        ValueError: The two are statistics of different features.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(
            f"statistics of {a.mu.size} and of {b.mu.size} features have no distance:"
            " use one eval.features for both"
        )
    if a.features and b.features and a.features != b.features:
        raise ValueError(
            f"statistics of {a.features} and of {b.features} have no distance:"
            " use one eval.features for both"
        )

    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


def frechet(generated: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Compute FID: the Frechet distance between the statistics of two sets, [N, D] and [M, D]."""
    return {"fid": frechet_distance(Statistics.of(generated), Statistics.of(reference))}


def inception_score(
    logits: torch.Tensor,
    reference: torch.Tensor | None = None,
    *,
    splits: int = 10,
    seed: int = SEED,
) -> dict[str, float]:
    """Compute IS over shuffled parts of at least one image.

    Args:
        logits: [N, classes].
        reference: Not read.
        splits: Parts, lowered to N if it is above.
        seed: Seeds the shuffle.
    """
    _check(logits, 1, "isc")
    splits = min(splits, len(logits))
    score = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return {
        "isc_mean": score[KEY_METRIC_ISC_MEAN],
        "isc_std": score[KEY_METRIC_ISC_STD],
        "isc_splits": splits,
    }


def kernel_distance(
    generated: torch.Tensor,
    reference: torch.Tensor,
    *,
    subset_size: int = 1000,
    subsets: int = 100,
    seed: int = SEED,
) -> dict[str, float]:
    """Compute KID over subsets no larger than either set.

    A subset as large as its set is the set itself: if both are, all draws are equal and `kid_std`
    is 0 up to rounding.

    Args:
        generated: [N, D].
        reference: [M, D].
        subset_size: Images per draw, lowered to min(N, M) if it is above.
        subsets: Number of draws.
        seed: Seeds the draws.
    """
    _check(generated, 2, "kid")
    _check(reference, 2, "kid")
    size = min(subset_size, len(generated), len(reference))

    # In float64, as KID is a small difference of sums of size^2 terms.
    distance = kid_features_to_metric(
        generated.double(),
        reference.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )

    return {
        "kid_mean": distance[KEY_METRIC_KID_MEAN],
        "kid_std": distance[KEY_METRIC_KID_STD],
        "kid_subset_size": size,
    }


def precision_recall(generated: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Compute precision and recall; every vector needs a third neighbour besides itself."""
    _check(generated, NEIGHBOUR + 1, "prc")
    _check(reference, NEIGHBOUR + 1, "prc")

    shares = prc_features_to_metric(
        generated,
        reference,
        prc_neighborhood=NEIGHBOUR,
        prc_batch_size=_PRC_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": shares[KEY_METRIC_PRECISION], "recall": shares[KEY_METRIC_RECALL]}


@dataclass(frozen=True)
class Value:
    """One number of a metric that tables and pictures show.

    Args:
        key: Its key in a row.
        label: Its name for readers.
        better: "lower" or "higher".
    """

    key: str
    label: str
    better: str


@dataclass(frozen=True)
class Metric:
    """A metric: a new one is an entry of `METRICS`, and nothing else.

    Args:
        compute: (generated, reference) features to the numbers of a row.
        values: Those of the numbers that are shown.
        least: The fewest images of a set on which it is defined.
        compares: False for a metric of the generated images alone.
        reads: The features that it is computed of: "pool", or the classes' "logits".
    """

    compute: Callable[..., dict[str, float]]
    values: tuple[Value, ...]
    least: int
    compares: bool = True
    reads: str = "pool"


METRICS = {
    "fid": Metric(frechet, (Value("fid", "Frechet distance", "lower"),), least=2),
    "isc": Metric(
        inception_score,
        (Value("isc_mean", "inception-style score", "higher"),),
        least=1,
        compares=False,
        reads="logits",
    ),
    "kid": Metric(kernel_distance, (Value("kid_mean", "kernel distance", "lower"),), least=2),
    "prc": Metric(
        precision_recall,
        (Value("precision", "precision", "higher"), Value("recall", "recall", "higher")),
        least=NEIGHBOUR + 1,
    ),
}

# Key in a row to the value, in the order in which rows are shown.
VALUES = {value.key: value for metric in METRICS.values() for value in metric.values}


def check_names(metrics: Sequence[str]) -> None:
    """Refuse metrics that are not in the registry, and an empty list.

    Raises:
        ValueError: naming the key.
    """
    if not metrics or any(metric not in METRICS for metric in metrics):
        raise ValueError(f"eval.metrics={list(metrics)}: choose from {', '.join(METRICS)}")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"eval.metrics={list(metrics)}: names one twice")


def distances(
    generated: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    layers: Mapping[str, str],
    metrics: Sequence[str] = ("fid", "isc", "kid"),
) -> dict[str, float]:
    """Compute the chosen metrics of generated images against reference images.

    Small sets are legal: KID's subsets and the parts of IS then shrink, and the result says to
    what.

    Args:
        generated: Layer to features [N, D], as `FeatureNetwork.extract` gives them.
        reference: The same of the reference images [M, D]; IS alone does not read it.
        layers: Metric to the layer that it reads (`FeatureNetwork.metric_layers`).
        metrics: Names, of `METRICS`.

    Returns:
        The numbers of each metric: "fid"; "isc_mean", "isc_std", "isc_splits"; "kid_mean",
        "kid_std", "kid_subset_size"; "precision", "recall".

    Raises:
        ValueError: An unknown metric, a layer that is missing, too few images, features that are
            not finite or whose widths differ.
    """
    check_names(metrics)
    result: dict[str, float] = {}

    for name in metrics:
        metric = METRICS[name]
        ours = _layer(generated, layers[name], "generated", name)
        if not metric.compares:
            result |= metric.compute(ours)
            continue

        # A distance: to the same layer of the reference.
        theirs = _layer(reference, layers[name], "reference", name)
        if ours.shape[1] != theirs.shape[1]:
            raise ValueError(
                f"{name} of {ours.shape[1]} generated and {theirs.shape[1]} reference features is"
                " undefined: use one eval.features for both"
            )
        result |= metric.compute(ours, theirs)

    return result


def _layer(
    features: Mapping[str, torch.Tensor], layer: str, whose: str, metric: str
) -> torch.Tensor:
    """Pick the layer of one set that a metric reads."""
    if layer not in features:
        raise ValueError(
            f"{metric} reads layer {layer!r}, which the {whose} features lack (they have"
            f" {', '.join(features) or 'none'}): extract both sets with one eval.features"
        )
    return features[layer].cpu()


def _check(vectors: torch.Tensor, least: int, metric: str) -> None:
    """Refuse sets on which a metric is undefined."""
    if len(vectors) < least:
        raise ValueError(
            f"{metric} needs at least {least} images, there are {len(vectors)}:"
            f" generate more, or leave {metric} out of eval.metrics"
        )
    broken = int((~torch.isfinite(vectors)).any(dim=1).sum())
    if broken:
        raise ValueError(
            f"the features of {broken} of {len(vectors)} images are not finite, so {metric}"
            " is undefined:"
            " look at the images and at eval.features.weights"
        )
