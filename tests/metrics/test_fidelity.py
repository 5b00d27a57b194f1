"""FID, IS, KID and precision/recall against slow definitions and cases whose value is known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from tdq_exp.metrics.fidelity import (
    METRICS,
    VALUES,
    Statistics,
    distances,
    frechet_distance,
    inception_score,
    kernel_distance,
)

LAYERS = {"fid": "pool", "kid": "pool", "prc": "pool", "isc": "logits"}


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Draw n vectors of N(mean, scale^2 I) as float32 [n, d]."""
    return mean + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    """Draw n vectors whose covariance is far from diagonal, as float32 [n, d]."""
    return gaussian(n, d, seed) @ gaussian(d, d, seed + 1000) + gaussian(1, d, seed + 2000)


def slow_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Evaluate the definition with scipy's square root of a matrix."""
    a, b = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def slow_kid(x: np.ndarray, y: np.ndarray) -> float:
    """Evaluate the unbiased MMD^2 with k(u, v) = (u . v / D + 1)^3, pair by pair."""
    d, m, n = x.shape[1], len(x), len(y)
    within_x = sum((x[i] @ x[j] / d + 1) ** 3 for i in range(m) for j in range(m) if i != j) / (
        m * (m - 1)
    )
    within_y = sum((y[i] @ y[j] / d + 1) ** 3 for i in range(n) for j in range(n) if i != j) / (
        n * (n - 1)
    )
    across = sum((u @ v / d + 1) ** 3 for u in x for v in y) / (m * n)
    return float(within_x + within_y - 2 * across)


def slow_share_inside(points: np.ndarray, centres: np.ndarray) -> float:
    """Count the points that lie within the third-neighbour ball of some centre."""
    inside = 0
    radii = [
        sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres
    ]  # place 0 is the centre itself
    for point in points:
        inside += any(np.linalg.norm(point - c) <= r for c, r in zip(centres, radii, strict=True))
    return inside / len(points)


# --- FID


@pytest.mark.parametrize("d", [1, 2, 17])
def test_frechet_distance_equals_scipys(d):
    x, y = correlated(300, d, 0), correlated(200, d, 1)
    expected = slow_frechet(x.double().numpy(), y.double().numpy())
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    eye = np.eye(3)
    a = Statistics(np.zeros(3), eye, 10)
    # A shift alone counts by its square; scales alone by the squared difference of deviations, per dimension.
    assert frechet_distance(a, Statistics(np.array([3.0, 0.0, 4.0]), eye, 10)) == pytest.approx(25)
    assert frechet_distance(a, Statistics(np.zeros(3), 9 * eye, 10)) == pytest.approx(
        3 * (3 - 1) ** 2
    )
    diagonal = np.diag([1.0, 4.0, 16.0])
    assert frechet_distance(a, Statistics(np.ones(3), diagonal, 10)) == pytest.approx(3 + 0 + 1 + 9)


def test_frechet_distance_is_symmetric_and_zero_for_equal_sets():
    x, y = Statistics.of(correlated(100, 8, 2)), Statistics.of(correlated(100, 8, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert frechet_distance(x, y) > 1


def test_rank_deficient_covariance_is_legal():
    """With fewer images than dimensions the trace of the root comes from the eigenvalues that are not zero."""
    x, y = correlated(12, 40, 4).double(), correlated(9, 40, 5).double()
    centred = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y)]
    # The roots of the eigenvalues of S_x S_y are the singular values of A_x A_y^T, where S = A^T A.
    trace_root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * trace_root
    )
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_statistics_are_float64_and_unbiased():
    x = correlated(50, 4, 6) + 100
    statistics = Statistics.of(x, "digits/pool")
    assert statistics.mu.dtype == statistics.sigma.dtype == np.float64
    np.testing.assert_allclose(statistics.mu, x.double().mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(statistics.sigma, torch.cov(x.double().T).numpy(), rtol=1e-10)
    assert statistics.n == 50 and statistics.features == "digits/pool"


def test_statistics_of_other_features_have_no_distance():
    a = Statistics.of(gaussian(20, 4, 0), "digits/pool")
    with pytest.raises(ValueError, match="eval.features"):
        frechet_distance(a, Statistics.of(gaussian(20, 5, 0)))
    with pytest.raises(ValueError, match="efficientnet_lite0/pool.*eval.features"):
        frechet_distance(a, Statistics.of(gaussian(20, 4, 0), "efficientnet_lite0/pool"))


# --- IS


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_of_sure_and_uniform_predictions_is_the_number_of_classes(classes):
    logits = 100 * torch.eye(classes).repeat(30, 1)
    result = inception_score(logits, splits=1)
    assert result == {
        "isc_mean": pytest.approx(classes),
        "isc_std": pytest.approx(0),
        "isc_splits": 1,
    }


def test_inception_score_of_equal_predictions_is_one():
    logits = gaussian(1, 10, 0).repeat(40, 1)
    assert distances({"logits": logits}, {}, LAYERS, ["isc"])["isc_mean"] == pytest.approx(1)


def test_inception_score_equals_its_definition():
    logits = 2 * gaussian(60, 7, 1)
    p = torch.softmax(logits.double(), 1)
    expected = torch.exp((p * (p / p.mean(0)).log()).sum(1).mean()).item()
    assert inception_score(logits, splits=1)["isc_mean"] == pytest.approx(expected)


def test_inception_score_of_few_images_takes_fewer_parts():
    result = distances({"logits": gaussian(4, 10, 0)}, {}, LAYERS, ["isc"])
    assert result["isc_splits"] == 4 and result["isc_mean"] == pytest.approx(
        1
    )  # one image per part says nothing


# --- KID


def test_kid_equals_its_definition():
    x, y = gaussian(30, 6, 0), gaussian(30, 6, 1, mean=0.3)
    result = kernel_distance(x, y, subsets=3)
    assert result["kid_subset_size"] == 30  # every subset is the whole set, so this is one value
    assert result["kid_mean"] == pytest.approx(
        slow_kid(x.double().numpy(), y.double().numpy()), rel=1e-9
    )
    assert result["kid_std"] == pytest.approx(0, abs=1e-9)


def test_kid_is_unbiased_at_zero():
    """Over many pairs of sets from one distribution the mean is zero within its error: some values are negative."""
    values = [
        kernel_distance(gaussian(50, 8, s), gaussian(50, 8, 500 + s), subsets=1) for s in range(200)
    ]
    kid = np.array([v["kid_mean"] for v in values])
    error = kid.std() / math.sqrt(len(kid))
    assert abs(kid.mean()) < 4 * error
    assert (kid < 0).any()
    # The biased estimate would be off by about (mean of k(x, x) - mean of k(x, x')) * 2 / 50, which must be detectable.
    x = gaussian(2000, 8, 9).double()
    bias = (((x * x).sum(1) / 8 + 1) ** 3).mean() - ((x[:1000] @ x[1000:].T / 8 + 1) ** 3).mean()
    assert float(bias) * 2 / 50 > 8 * error


def test_kid_keeps_its_precision_for_large_features():
    """In float32 the sums of k lose the distance between sets whose features are large."""
    x, y = gaussian(200, 4, 0, mean=300), gaussian(200, 4, 1, mean=300)
    expected = kernel_distance(x.double(), y.double(), subsets=2)
    actual = kernel_distance(x, y, subsets=2)
    assert actual["kid_mean"] == expected["kid_mean"]


def test_kid_subset_is_no_larger_than_either_set():
    def size(n: int, m: int, wanted: int) -> float:
        sets = gaussian(n, 4, 0), gaussian(m, 4, 1)
        return kernel_distance(*sets, subset_size=wanted, subsets=2)["kid_subset_size"]

    assert (size(20, 30, 1000), size(30, 20, 1000), size(30, 20, 7)) == (20, 20, 7)


# --- precision and recall


def test_precision_and_recall_equal_their_definition():
    x, y = gaussian(40, 3, 0, scale=0.5), gaussian(60, 3, 1)
    result = distances({"pool": x}, {"pool": y}, LAYERS, ["prc"])
    assert result["precision"] == pytest.approx(
        slow_share_inside(x.double().numpy(), y.double().numpy())
    )
    assert result["recall"] == pytest.approx(
        slow_share_inside(y.double().numpy(), x.double().numpy())
    )
    assert (
        result["precision"] > result["recall"]
    )  # generated is the first: it lies within, and does not cover


# --- all of them


def test_all_metrics_are_reported_under_their_names():
    def features(seed: int) -> dict[str, torch.Tensor]:
        return {"pool": gaussian(60, 5, seed), "logits": gaussian(60, 10, seed)}

    result = distances(features(0), features(1), LAYERS, ("fid", "isc", "kid", "prc"))
    assert set(result) == {
        *(
            "fid",
            "isc_mean",
            "isc_std",
            "isc_splits",
            "kid_mean",
            "kid_std",
            "kid_subset_size",
            "precision",
            "recall",
        )
    }
    assert all(math.isfinite(value) for value in result.values())
    assert set(distances(features(0), features(1), LAYERS)) == set(result) - {"precision", "recall"}


def test_same_seed_same_numbers_other_seed_other_numbers():
    def run(seed: int) -> dict[str, float]:
        a, b, logits = gaussian(60, 5, 0), gaussian(60, 5, 1), gaussian(60, 10, 0)
        return kernel_distance(a, b, subset_size=20, seed=seed) | inception_score(logits, seed=seed)

    state = np.random.get_state()[1].copy()
    assert run(0) == run(0)
    assert run(0)["kid_mean"] != run(1)["kid_mean"] and run(0)["isc_mean"] != run(1)["isc_mean"]
    assert np.array_equal(
        np.random.get_state()[1], state
    )  # the global draws of others are left alone


def test_a_worse_set_is_further_away():
    reference, close, far = (
        {"pool": gaussian(200, 6, s, mean=m)} for s, m in ((0, 0.0), (1, 0.1), (2, 0.5))
    )
    a, b = (distances(g, reference, LAYERS, ["fid", "kid"]) for g in (close, far))
    assert a["fid"] < b["fid"] and a["kid_mean"] < b["kid_mean"]


@pytest.mark.parametrize("metric", ["fid", "isc", "kid", "prc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(metric, value):
    good, bad = gaussian(20, 4, 0), gaussian(20, 4, 0)
    bad[3, 1] = value
    bad[7] = value
    pairs = [(bad, good)] if metric == "isc" else [(bad, good), (good, bad)]
    for ours, theirs in pairs:
        with pytest.raises(ValueError, match=f"2 of 20 images are not finite.*{metric}") as error:
            distances({"pool": ours, "logits": ours}, {"pool": theirs}, LAYERS, [metric])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("metric", "least"), [("fid", 2), ("isc", 1), ("kid", 2), ("prc", 4)])
def test_too_few_images_are_refused(metric, least):
    assert METRICS[metric].least == least
    enough = {"pool": gaussian(least, 4, 0), "logits": gaussian(least, 4, 0)}
    short = {layer: rows[: least - 1] for layer, rows in enough.items()}
    assert all(
        math.isfinite(value) for value in distances(enough, enough, LAYERS, [metric]).values()
    )
    with pytest.raises(ValueError, match=f"{metric} needs at least {least} images.*eval.metrics"):
        distances(short, enough, LAYERS, [metric])


def test_wrong_names_and_widths_are_refused():
    rows = {"pool": gaussian(20, 4, 0)}
    with pytest.raises(ValueError, match="eval.metrics=.*sfid.*: choose from fid, isc, kid, prc"):
        distances(rows, rows, LAYERS, ["fid", "sfid"])
    with pytest.raises(ValueError, match="reads layer 'logits', which the generated features lack"):
        distances(rows, rows, LAYERS, ["isc"])
    with pytest.raises(ValueError, match="reads layer 'pool', which the reference features lack"):
        distances(rows, {}, LAYERS, ["kid"])
    for metric in ("fid", "kid", "prc"):
        with pytest.raises(ValueError, match="use one eval.features for both"):
            distances(rows, {"pool": gaussian(20, 5, 0)}, LAYERS, [metric])


def test_the_registry_names_every_shown_number_and_which_side_is_better():
    features = {"pool": gaussian(60, 5, 0), "logits": gaussian(60, 10, 0)}
    result = distances(features, features, LAYERS, list(METRICS))
    assert list(VALUES) == ["fid", "isc_mean", "kid_mean", "precision", "recall"]
    assert set(VALUES) <= set(result)
    better = {key: value.better for key, value in VALUES.items()}
    assert better == {
        "fid": "lower",
        "isc_mean": "higher",
        "kid_mean": "lower",
        "precision": "higher",
        "recall": "higher",
    }
