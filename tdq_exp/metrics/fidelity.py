"""Distances between generated and reference images, from their feature vectors.

With f_i in R^D the features of one set, mu = mean(f) and Sigma = cov(f):

    FID  = |mu_g - mu_r|^2 + Tr(Sigma_g + Sigma_r - 2 (Sigma_g Sigma_r)^(1/2))
    IS   = exp(E_x KL(p(y | x) || p(y)))                                     mean and deviation over `isc_splits` parts
    KID  = MMD^2, unbiased, with k(f, f') = (f . f' / D + 1)^3               mean and deviation over `kid_subsets` draws
    precision (recall) = share of generated (real) vectors within the third-neighbour ball of a real (generated) one

The formulas are evaluated by torch-fidelity; its defaults and its seed are the defaults here.

FID is biased upwards by an amount that falls as 1/N and depends on the model: compare equal N only. With N <= D the
covariance has rank N - 1 at most. That is legal, the trace of the square root is still defined, but the bias is large.
KID has no such bias.

References:
    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NIPS 2017 (FID);
    Salimans et al., "Improved Techniques for Training GANs", NIPS 2016 (IS);
    Binkowski et al., "Demystifying MMD GANs", ICLR 2018 (KID);
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019;
    Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020 (the bias).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from tdq_exp.metrics.features import METRICS

# The third-nearest neighbour is the one that torch-fidelity and the paper of precision and recall take.
_NEIGHBOUR = 3
# Distances are computed this many rows at a time, so that 50,000 images need 2 GB and not 10.
_PRC_ROWS = 10_000


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mu: float64 [D].
        sigma: float64 [D, D], unbiased (divided by N - 1).
        n: The number of images N.
        features: Which features these are, as free text such as "digits/pool/<hash>"; empty if unknown.
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

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears under its name only when it is whole.

        Args:
            path: The file; its folder is made if need be.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        arrays = {"mu": np.ascontiguousarray(self.mu), "sigma": np.ascontiguousarray(self.sigma)}
        metadata = {"n": str(self.n), "features": self.features}
        # Not save_file: it makes a file that only its owner can read, and statistics are there to be shared.
        unfinished.write_bytes(safetensors.numpy.save(arrays, metadata))
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"reference statistics {path} do not exist: compute them, or name another file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                mu, sigma, n = file.get_tensor("mu"), file.get_tensor("sigma"), int(metadata["n"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold statistics (mu, sigma, n): compute them again") from error
        if mu.dtype != np.float64 or sigma.dtype != np.float64 or sigma.shape != (*mu.shape, *mu.shape):
            raise ValueError(
                f"{path} holds mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape} instead of float64 (D,)"
                " and (D, D): compute the statistics again"
            )
        return cls(mu, sigma, n, metadata.get("features", ""))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""Compute the squared Frechet distance between two Gaussians, |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of S_a S_b. Rounding may leave a distance of zero
    slightly negative.

    Args:
        a: One set.
        b: The other.

    Raises:
        ValueError: The two are statistics of different features.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(
            f"statistics of {a.mu.size} and of {b.mu.size} features have no distance: use one eval.features for both"
        )
    if a.features and b.features and a.features != b.features:
        raise ValueError(
            f"statistics of {a.features} and of {b.features} have no distance: use one eval.features for both"
        )
    pair = ({"mu": s.mu, "sigma": s.sigma} for s in (a, b))
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


def distances(
    generated: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    layers: Mapping[str, str],
    metrics: Sequence[str] = ("fid", "isc", "kid"),
    *,
    kid_subset_size: int = 1000,
    kid_subsets: int = 100,
    isc_splits: int = 10,
    seed: int = 2020,
) -> dict[str, float]:
    """Compute the chosen metrics of generated images against reference images.

    Small sets are legal: KID's subsets and the parts of IS then shrink, and the result says to what. A subset as large
    as its set is the set itself: if both are, all draws are equal and `kid_std` is 0 up to rounding.

    Args:
        generated: Layer to features [N, D], as `FeatureNetwork.extract` gives them.
        reference: The same of the reference images [M, D]; IS alone does not read it.
        layers: Metric to the layer that it reads (`FeatureNetwork.metric_layers`).
        metrics: Some of "fid", "isc", "kid", "prc".
        kid_subset_size: Images per draw of KID, lowered to min(N, M) if it is above.
        kid_subsets: Draws of KID.
        isc_splits: Parts of IS, lowered to N if it is above.
        seed: Seeds KID's draws and the shuffle before IS.

    Returns:
        "fid"; "isc_mean", "isc_std", "isc_splits"; "kid_mean", "kid_std", "kid_subset_size"; "precision", "recall".

    Raises:
        ValueError: An unknown metric, a layer that is missing, too few images, features that are not finite or whose
            widths differ.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"eval.metrics has {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    result: dict[str, float] = {}
    for metric in metrics:
        ours = _layer(generated, layers[metric], "generated", metric)
        if metric == "isc":
            result |= _inception_score(ours, isc_splits, seed)
            continue
        theirs = _layer(reference, layers[metric], "reference", metric)
        if ours.shape[1] != theirs.shape[1]:
            raise ValueError(
                f"{metric} of {ours.shape[1]} generated and {theirs.shape[1]} reference features is undefined:"
                " use one eval.features for both"
            )
        if metric == "fid":
            result["fid"] = frechet_distance(Statistics.of(ours), Statistics.of(theirs))
        elif metric == "kid":
            result |= _kernel_distance(ours, theirs, kid_subset_size, kid_subsets, seed)
        else:
            result |= _precision_recall(ours, theirs)
    return result


def _inception_score(logits: torch.Tensor, splits: int, seed: int) -> dict[str, float]:
    """Compute IS over shuffled parts of at least one image."""
    _check(logits, 1, "isc")
    splits = min(splits, len(logits))
    score = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return {"isc_mean": score[KEY_METRIC_ISC_MEAN], "isc_std": score[KEY_METRIC_ISC_STD], "isc_splits": splits}


def _kernel_distance(ours: torch.Tensor, theirs: torch.Tensor, size: int, subsets: int, seed: int) -> dict[str, float]:
    """Compute KID over subsets no larger than either set."""
    _check(ours, 2, "kid")
    _check(theirs, 2, "kid")
    size = min(size, len(ours), len(theirs))
    # In float64, as KID is a small difference of sums of size^2 terms.
    distance = kid_features_to_metric(
        ours.double(), theirs.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return {
        "kid_mean": distance[KEY_METRIC_KID_MEAN],
        "kid_std": distance[KEY_METRIC_KID_STD],
        "kid_subset_size": size,
    }


def _precision_recall(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Compute precision and recall; every vector needs a third neighbour besides itself."""
    _check(ours, _NEIGHBOUR + 1, "prc")
    _check(theirs, _NEIGHBOUR + 1, "prc")
    shares = prc_features_to_metric(
        ours, theirs, prc_neighborhood=_NEIGHBOUR, prc_batch_size=_PRC_ROWS, save_cpu_ram=True, verbose=False
    )
    return {"precision": shares[KEY_METRIC_PRECISION], "recall": shares[KEY_METRIC_RECALL]}


def _layer(features: Mapping[str, torch.Tensor], layer: str, whose: str, metric: str) -> torch.Tensor:
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
            f"the features of {broken} of {len(vectors)} images are not finite, so {metric} is undefined:"
            " look at the images and at eval.features.weights"
        )
