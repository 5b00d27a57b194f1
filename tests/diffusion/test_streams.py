"""Named random streams: the numbers of recorded rows stay, and no two streams share any."""

from itertools import product
from pathlib import Path

import pytest
import torch

import tdq_exp
from tdq_exp.diffusion.draws import (
    BareSeed,
    Stream,
    draw_batch,
    fixed_draws,
    generator,
    image_generators,
    seed_global,
)

GLOBAL = (Stream.TRAINING_NOISE, Stream.BLOCK_NOISE, Stream.OVER_TIME_NOISE)

# First two normal numbers of each stream, as recorded rows were made with. Frozen before streams
# had names: seed 0 for all, seeds 1 and 2 for images.
RECORDED = {
    (0, Stream.EPOCH, 0): [-1.263908, 1.012169],
    (0, Stream.UPDATE, 0): [0.169343, 0.591015],
    (0, Stream.VALIDATION): [0.079407, -1.268201],
    (0, Stream.CALIBRATION): [0.439702, -0.99023],
    (0, Stream.FORWARD_TIMES): [-1.796385, 1.001283],
    (0, Stream.IMAGE, 0): [-0.129797, 1.417967],
    (1, Stream.IMAGE, 0): [-1.696407, 0.030222],
    (2, Stream.IMAGE, 0): [-2.591188, -0.659749],
    (0, Stream.CALIBRATION_TIMES, 0): [0.685952, 0.657023],
    (0, Stream.BLOCK_BATCH, 1, 0, 2): [0.233139, -0.439087],
    (0, Stream.FORWARD_IMAGES): [-1.148907, 0.094266],
    (0, Stream.FORWARD_NOISE, 0): [-0.723541, 1.12692],
    (0, Stream.TRAJECTORY, 0): [-1.802081, -1.504517],
    (0, Stream.OVER_TIME_BATCH, 0): [0.826712, 0.861616],
    (0, Stream.FORWARD_LATENTS, 0): [2.04771, 2.727809],
    (0, Stream.RECONSTRUCTION, 0): [-1.209646, 0.845932],
}


@pytest.mark.parametrize("key", RECORDED, ids=str)
def test_recorded_rows_keep_their_numbers(key):
    found = torch.randn(2, generator=generator(*key)).tolist()
    assert found == pytest.approx(RECORDED[key], abs=1e-6)


@pytest.mark.parametrize(
    ("stream", "t", "index", "eps"),
    [
        (Stream.VALIDATION, [987, 258, 758, 574, 126, 358], [3, 1, 0, 2, 1, 2], 0.962323),
        (Stream.CALIBRATION, [491, 963, 136, 819, 240, 548], [1, 2, 0, 3, 3, 0], 2.504165),
        (Stream.FORWARD_TIMES, [313, 69, 435, 781, 841, 547], [0, 2, 1, 3, 1, 3], -0.861829),
    ],
)
def test_fixed_draws_of_recorded_rows_keep_their_numbers(stream, t, index, eps):
    draws = fixed_draws(0, stream, samples=6, images=4, shape=(1, 1, 1), steps=1000)
    assert draws.t.tolist() == t
    assert draws.index.tolist() == index
    assert float(draws.eps.flatten()[0]) == pytest.approx(eps, abs=1e-6)


def test_updates_of_recorded_rows_keep_their_numbers():
    draws = draw_batch(0, 0, batch_size=4, images=20, shape=(1, 1, 1), steps=1000, flip=True)
    assert draws.index.tolist() == [14, 6, 11, 13]
    assert draws.t.tolist() == [603, 299, 729, 545]
    assert draws.flip.tolist() == [True, False, True, True]
    assert float(draws.eps.flatten()[0]) == pytest.approx(0.256699, abs=1e-6)


@pytest.mark.parametrize("rank", range(3))
def test_noise_of_layers_in_recorded_rows_is_seeded_by_the_rank(rank):
    expected = torch.randn(4, generator=torch.Generator().manual_seed(rank))
    with torch.random.fork_rng(devices=[]):
        seed_global(0, Stream.TRAINING_NOISE, rank)
        assert torch.equal(torch.randn(4), expected)


def first_draws(seed, stream, *index):
    if stream not in GLOBAL:
        return tuple(torch.rand(4, generator=generator(seed, stream, *index)).tolist())
    with torch.random.fork_rng(devices=[]):
        seed_global(seed, stream, *(index or (0,)))
        return tuple(torch.rand(4).tolist())


def test_no_two_seeds_or_streams_share_their_draws():
    keys = list(product(range(6), Stream))
    indexed = [(*key, i) for key in keys if key[1] not in GLOBAL for i in range(3)]
    assert len({first_draws(*key) for key in keys + indexed}) == len(keys) + len(indexed)


def test_images_of_an_export_are_not_those_of_any_sampling_seed():
    (ours,) = image_generators(0, range(1), Stream.EXPORT_RANGE)
    theirs = [image_generators(seed, range(1))[0] for seed in range(6)]
    assert ours.initial_seed() not in [g.initial_seed() for g in theirs]


def test_every_draw_without_a_stream_is_listed_with_its_reason():
    package = Path(tdq_exp.__file__).parent
    texts = {p.relative_to(package).as_posix(): p.read_text() for p in package.rglob("*.py")}
    seeding = {file for file, text in texts.items() if "manual_seed(" in text}
    assert seeding == {"diffusion/draws.py", "quant/calibrate.py"}

    users = "".join(text for file, text in texts.items() if file != "diffusion/draws.py")
    for draw in BareSeed:
        assert f"BareSeed.{draw.name}" in users
        assert len(draw.value) > 40
