"""The deviation of halves: of the right size, and the same for the same set."""

import pytest
import torch

from tdq_exp.metrics.fidelity import Statistics, frechet_distance
from tdq_exp.metrics.half_sampling import deviation_of_frechet
from tdq_exp.metrics.image_sets import beside


def vectors(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator) + shift


def test_halves_vary_as_whole_sets_do():
    """Against the deviation over sets that are really drawn anew, far from the reference."""
    reference = vectors(4000, seed=1)
    drawn = [
        frechet_distance(Statistics.of(vectors(200, seed, 1.0)), Statistics.of(reference))
        for seed in range(2, 62)
    ]
    expected = float(torch.tensor(drawn).std())
    found = deviation_of_frechet(vectors(200, 0, 1.0), reference, draws=60)
    assert found["fid"] == pytest.approx(expected, rel=0.35) and found["draws"] == 60


def test_one_half_is_the_distance_of_that_half():
    generated, reference = vectors(40, 0, 0.5), vectors(50, 1)
    stream = torch.Generator().manual_seed(7)
    halves = [generated[torch.randperm(40, generator=stream)[:20]] for _ in range(3)]
    distances = [frechet_distance(Statistics.of(half), Statistics.of(reference)) for half in halves]
    expected = float(torch.tensor(distances, dtype=torch.float64).std())
    assert deviation_of_frechet(generated, reference, 3, 7)["fid"] == pytest.approx(expected, 1e-6)


def test_a_row_states_a_second_metric_unless_it_was_asked_for():
    layers = {"fid": "a", "prc": "a"}
    sets = {"a": vectors(30, 0)}, {"a": vectors(30, 1)}
    assert set(beside(*sets, layers, ["fid"])) == {"half_sampling", "precision_recall"}
    assert set(beside(*sets, layers, ["fid", "prc"])) == {"half_sampling"}
    few = {"a": vectors(3, 0)}, {"a": vectors(30, 1)}
    assert beside(*few, layers, ["fid"]) == {}
