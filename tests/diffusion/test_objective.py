"""The training objective, and draws that are functions of the seed, the update and the place in the global batch."""

import pytest
import torch

from tdq_exp.diffusion.draws import Draws, Stream, draw_batch, fixed_draws, generator, mix
from tdq_exp.diffusion.objective import noise_prediction_loss

OPTIONS = {"batch_size": 8, "images": 20, "shape": (1, 2, 2), "steps": 1000, "flip": True}
FIELDS = ("index", "flip", "t", "eps")


def same(a: Draws, b: Draws) -> bool:
    """Are all four fields equal?"""
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


# --- Loss


def test_losses_equal_their_definitions():
    eps_hat, eps = torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, -2.0]])
    assert float(noise_prediction_loss(eps_hat, eps)) == (1 + 9 + 0 + 4) / 4
    assert float(noise_prediction_loss(eps_hat, eps, "l2")) == (1 + 9 + 0 + 4) / 4
    assert float(noise_prediction_loss(eps_hat, eps, "l1")) == (1 + 3 + 0 + 2) / 4


def test_loss_of_half_precision_is_computed_in_single():
    eps_hat, eps = torch.full((1000,), 0.1).bfloat16(), torch.zeros(1000)
    loss = noise_prediction_loss(eps_hat, eps)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(torch.tensor(0.1).bfloat16()) ** 2, rel=1e-5)


def test_an_unknown_loss_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"loss='huber'"):
        noise_prediction_loss(torch.zeros(1), torch.zeros(1), "huber")


# --- Keys


def test_generators_are_functions_of_their_key():
    def first(*key):
        return torch.randn(4, generator=torch.Generator().manual_seed(mix(*key))).tolist()

    assert first(0, 1, 2) == first(0, 1, 2)
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2, 1), (1, 2), (-1,), (2**40,)]
    assert len({tuple(first(*key)) for key in keys}) == len(keys)


def test_neighbouring_keys_give_unrelated_streams():
    generators = [generator(0, Stream.UPDATE, update) for update in range(60)]
    rows = torch.stack([torch.randn(400, generator=g) for g in generators])
    alike = torch.corrcoef(rows) - torch.eye(60)
    assert float(alike.abs().max()) < 0.25  # five standard deviations


# --- Draws of an update


def test_draws_are_pure_functions_of_seed_and_update():
    first = draw_batch(3, 17, **OPTIONS)
    torch.manual_seed(99)
    torch.randn(5)
    for other in (0, 16, 18):  # nothing that is drawn before or between moves it
        draw_batch(3, other, **OPTIONS)
    assert same(draw_batch(3, 17, **OPTIONS), first)
    assert not torch.equal(draw_batch(3, 18, **OPTIONS).eps, first.eps)
    assert not torch.equal(draw_batch(4, 17, **OPTIONS).eps, first.eps)
    assert not torch.equal(draw_batch(4, 17, **OPTIONS).t, first.t)


def test_draws_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_batch(0, 0, **OPTIONS)
    fixed_draws(0, Stream.VALIDATION, samples=10, images=5, shape=(1, 2, 2), steps=10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8, 13, 20])
def test_every_image_comes_once_per_epoch_across_borders_too(batch_size):
    options = OPTIONS | {"batch_size": batch_size}
    updates = -(-5 * 20 // batch_size)
    visited = torch.cat([draw_batch(0, update, **options).index for update in range(updates)])
    epochs = visited[: 5 * 20].reshape(5, 20)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert len(epochs.unique(dim=0)) == 5  # in another order each time


def test_epochs_of_two_seeds_differ():
    orders = [
        torch.cat([draw_batch(seed, u, **OPTIONS | {"batch_size": 10}).index for u in (0, 1)])
        for seed in (0, 1)
    ]
    assert not torch.equal(*orders)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_add_up_to_the_whole_batch(world):
    whole = draw_batch(0, 5, **OPTIONS)
    shards = [whole.shard(rank, world) for rank in range(world)]
    for field in FIELDS:
        assert torch.equal(
            torch.cat([getattr(shard, field) for shard in shards]), getattr(whole, field)
        )
    assert all(len(shard.t) == 8 // world for shard in shards)


def test_a_batch_that_does_not_divide_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"fit\.batch_size=8.*\(3\)"):
        draw_batch(0, 0, **OPTIONS).shard(0, 3)


def test_a_batch_larger_than_the_data_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"fit\.batch_size=21.*20 images"):
        draw_batch(0, 0, **OPTIONS | {"batch_size": 21})
    assert len(draw_batch(0, 0, **OPTIONS | {"batch_size": 20}).t) == 20


def test_times_are_uniform_noise_is_normal_and_half_are_mirrored():
    draws = [
        draw_batch(0, update, **OPTIONS | {"batch_size": 1000, "images": 1000})
        for update in range(20)
    ]
    t = torch.cat([d.t for d in draws])
    assert int(t.min()) == 0 and int(t.max()) == 999
    counts = torch.bincount(t // 100, minlength=10)
    assert float((counts / 2000 - 1).abs().max()) < 0.1
    eps = torch.cat([d.eps for d in draws])
    assert eps.shape == (20_000, 1, 2, 2)
    assert abs(float(eps.mean())) < 0.02 and float(eps.std()) == pytest.approx(1, abs=0.02)
    mirrored = torch.cat([d.flip for d in draws])
    assert mirrored.dtype == torch.bool
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_without_flips_nothing_is_mirrored_and_nothing_else_changes():
    mirrored, plain = (draw_batch(0, 3, **OPTIONS | {"flip": flip}) for flip in (True, False))
    assert not bool(plain.flip.any())
    assert torch.equal(mirrored.t, plain.t) and torch.equal(mirrored.eps, plain.eps)


# --- Fixed draws


def fixed(samples, images=5, steps=1000, seed=0):
    return fixed_draws(
        seed, Stream.VALIDATION, samples=samples, images=images, shape=(1, 2, 2), steps=steps
    )


@pytest.mark.parametrize("samples", [10, 1000, 2500])
def test_fixed_draws_cover_all_of_time_evenly(samples):
    t = fixed(samples).t.sort().values
    assert len(t) == samples
    for i, value in enumerate(
        t.tolist()
    ):  # one in each of as many equal parts as there are samples
        assert i * 1000 // samples <= value <= ((i + 1) * 1000 - 1) // samples


def test_fixed_draws_are_shuffled_functions_of_the_seed():
    draws = fixed(100)
    assert not torch.equal(draws.t, draws.t.sort().values)
    assert same(draws, fixed(100))
    assert not torch.equal(draws.t, fixed(100, seed=1).t)
    assert not torch.equal(draws.eps, fixed(100, seed=1).eps)
    assert not bool(draws.flip.any())


def test_time_and_image_of_fixed_draws_are_independent():
    draws = fixed(4000, images=4000)
    pairs = torch.stack([draws.t.double(), draws.index.double()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.08


@pytest.mark.parametrize(("samples", "images"), [(10, 50), (50, 50), (120, 50)])
def test_fixed_draws_repeat_images_only_if_they_must(samples, images):
    counts = torch.bincount(fixed(samples, images).index, minlength=images)
    assert int(counts.max()) == -(-samples // images)
    assert int(counts.max() - counts.min()) <= 1


def test_fixed_draws_differ_from_those_of_training():
    training = draw_batch(0, 0, batch_size=4, images=5, shape=(1, 2, 2), steps=1000, flip=False)
    assert not torch.equal(fixed(4).eps, training.eps)
