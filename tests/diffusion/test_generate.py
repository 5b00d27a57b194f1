"""Groups of images, and noise that belongs to an image and not to the batch that it is drawn in."""

import pytest
import torch

from tdq_exp.diffusion.draws import groups, image_generators, starting_noise


@pytest.mark.parametrize(
    ("images", "batch", "count"), [(12, 4, 3), (13, 4, 4), (3, 4, 1), (4, 4, 1), (0, 4, 0)]
)
def test_groups_are_whole_and_aligned(images, batch, count):
    found = list(groups(images, batch))
    assert [number for number, _ in found] == list(range(count))
    assert all(len(indices) == batch for _, indices in found)
    covered = [index for _, indices in found for index in indices]
    assert covered == list(range(count * batch))
    assert len(covered) >= images


def test_noise_of_an_image_is_the_same_in_any_batch():
    whole = starting_noise(image_generators(7, range(8)), (3, 4, 4))
    assert whole.shape == (8, 3, 4, 4)
    for indices in (range(2, 5), range(7, 8), range(0, 8, 3)):
        part = starting_noise(image_generators(7, indices), (3, 4, 4))
        assert torch.equal(part, whole[list(indices)])


def test_images_and_seeds_have_different_noise():
    first = starting_noise(image_generators(0, range(50)), (1, 8, 8)).flatten(1)
    second = starting_noise(image_generators(1, range(50)), (1, 8, 8)).flatten(1)
    everything = torch.cat([first, second])
    assert len(everything.unique(dim=0)) == 100
    alike = torch.corrcoef(everything) - torch.eye(100)
    assert float(alike.abs().max()) < 0.6  # 64 numbers each: five standard deviations


def test_noise_is_standard_normal():
    x = starting_noise(image_generators(0, range(500)), (3, 8, 8))
    assert abs(float(x.mean())) < 0.01
    assert float(x.std()) == pytest.approx(1, abs=0.01)


def test_sampling_goes_on_with_the_same_stream():
    # What a stochastic sampler draws next must not repeat the starting noise.
    generators = image_generators(0, range(2))
    first, second = (starting_noise(generators, (1, 4, 4)) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = starting_noise(image_generators(0, range(2)), (1, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(starting_noise(image_generators(0, range(2)), (1, 4, 4)), first)
