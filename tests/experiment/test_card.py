"""Plans for a GPU that was measured before."""

from __future__ import annotations

import pytest

from tdq_exp.config import assets
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import card, cost

WORDS = ["+experiment=ddim_w4a4_lsq_tdq", "model.weights=random", "tracker=none"]


def job(*words):
    return jobs.build(compose([*WORDS, *words]), source=False)


@pytest.fixture(scope="module")
def rates():
    """The measured rates of the CIFAR-10 network."""
    ((name, networks),) = assets.read_yaml(assets.configs() / "cards.yaml").items()
    return name, networks["ddim_cifar10"]


def test_hours_are_images_times_measured_seconds(rates):
    name, known = rates
    made = job("fit.precision=bfloat16")
    found = card.estimate(made, forward_passes=1.0, images=50_000)

    options = made.fit.options
    trained = options.updates * options.batch_size * known["train"]["bfloat16"]["LSQ+TDQ"]
    sampled = 50_000 * made.sampling.steps * known["denoise"]["float32"]["LSQ+TDQ"]
    sampling = known["sampling"]
    sample_gb = sampling["memory_gb"]["LSQ+TDQ"] * made.sampling.batch / sampling["batch"]
    train_gb = known["memory_gb"]["bfloat16"]["LSQ+TDQ"]
    assert found == card.CardCost(
        name, "bfloat16", trained, sampled, train_gb, True, sample_gb=sample_gb
    )
    line = cost.on_card(found)
    assert name in line and "bfloat16, images" in line
    assert f"at most {train_gb:.0f} GB training and {sample_gb:.0f} GB sampling" in line


def test_a_decoder_may_take_more_memory_than_sampling():
    made = jobs.build(
        compose(["+experiment=ldm_w4a4_lsq_tdq", "model.weights=random", "sampler.batch=10"]),
        source=False,
    )
    ((_, networks),) = assets.read_yaml(assets.configs() / "cards.yaml").items()
    decode = networks["ldm_churches"]["sampling"]["decode_gb"]
    assert card.estimate(made, 0.0, 50_000).sample_gb == decode > 0


def test_what_is_done_costs_nothing():
    found = card.estimate(job(), forward_passes=0.0, images=0)
    assert found.seconds == 0


def test_a_static_network_and_a_reconstruction_take_rates_of_their_own(rates):
    _, known = rates
    static = card.estimate(job("tdq=none"), 1.0, 0)
    options = job().fit.options
    updates = options.updates * options.batch_size
    assert static.fit_seconds == updates * known["train"]["float32"]["LSQ"]

    made = jobs.build(
        compose(["+experiment=ddim_w8a5_ptq4dm_tdq", "model.weights=random"]), source=False
    )
    found = card.estimate(made, 1e6, 0)
    assert found.fit_seconds == 1e6 * known["denoise"]["float32"]["float"]
    assert found.memory_gb is None


def test_another_network_is_scaled_by_its_multiplications_and_a_small_one_is_left_out(rates):
    _, known = rates
    assert card.multiplications(job()) == known["multiplications"]

    other = job("model.definition.network.layers_per_block=1")
    share = card.multiplications(other) / known["multiplications"]
    found, whole = (card.estimate(made, 1.0, 100) for made in (other, job()))
    assert 0.3 < share < 0.9 and not found.measured and found.memory_gb is None
    assert found.seconds == pytest.approx(share * whole.seconds)
    assert "at least, from counted multiplications" in cost.on_card(found)

    assert card.estimate(jobs.build(compose(["tracker=none"]), source=False), 1.0, 10) is None
