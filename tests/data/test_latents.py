"""Moments of latents: kept for image and mirror, drawn at every step, never paired with another set's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdq_exp.data import latents
from tdq_exp.data.images import Images
from tdq_exp.data.latents import encoded
from tdq_exp.diffusion.draws import Stream, draw_batch, fixed_draws
from tdq_exp.runtime.processes import Processes

SHAPE = (2, 2, 2)


@pytest.fixture(scope="module")
def processes():
    return Processes(cpu=True)


@pytest.fixture(autouse=True)
def groups_of_4(monkeypatch):
    monkeypatch.setattr(latents, "GROUP", 4)


def images(count=10, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return Images(pixels, f"content{seed}", "as made")


def encode(x):
    """Something that tells an image from its mirror."""
    mean = torch.cat([x[:, :, :2, :2], x[:, :, 2:, 2:]], 1)
    return mean, mean.abs() / 10


def made(processes, cache, of=None, mirror=True, by="abc", encode=encode):
    return encoded(
        of or images(), encode, SHAPE, mirror=mirror, by=by, cache=cache, processes=processes
    )


def test_a_batch_is_mean_plus_deviation_times_noise_of_the_image_or_its_mirror(tmp_path, processes):
    found, source = made(processes, tmp_path), images()
    index, flip = torch.tensor([7, 7, 0]), torch.tensor([False, True, True])
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    mean, deviation = encode(source.batch(index, flip))
    assert torch.equal(found.batch(index, flip, noise), mean + deviation * noise)
    assert not torch.equal(mean[0], mean[1])
    assert len(found) == 10 and found.random and not source.random


def test_two_draws_of_one_image_differ_and_a_draw_is_never_forgotten(tmp_path, processes):
    found = made(processes, tmp_path)
    index, flip = torch.tensor([3]), torch.tensor([False])
    one, other = (found.batch(index, flip, torch.full((1, *SHAPE), value)) for value in (1.0, -1.0))
    assert (one != other).any()
    with pytest.raises(ValueError, match="needs noise"):
        found.batch(index, flip)


def test_the_same_set_is_encoded_once_and_another_one_apart(tmp_path, processes):
    first = made(processes, tmp_path)
    again = made(processes, tmp_path, encode=None)  # would fail if it were called
    assert again.arrays.folder == first.arrays.folder and again.content == first.content
    others = [made(processes, tmp_path, by="other"), made(processes, tmp_path, of=images(seed=1))]
    assert len({first.content, *(other.content for other in others)}) == 3
    assert len({first.arrays.folder, *(other.arrays.folder for other in others)}) == 3


def test_interrupted_encoding_goes_on_with_the_same_bits(tmp_path, processes):
    whole = made(processes, tmp_path / "whole")
    calls = []

    def broken(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(x)

    with pytest.raises(KeyboardInterrupt):
        made(processes, tmp_path / "broken", encode=broken)
    assert calls == [4, 4, 4, 4]
    calls.clear()
    found = made(
        processes, tmp_path / "broken", encode=lambda x: (calls.append(len(x)), encode(x))[1]
    )
    assert calls == [4, 4, 2, 2]  # the first group was kept
    assert (found.arrays.folder / "moments.npy").read_bytes() == (
        whole.arrays.folder / "moments.npy"
    ).read_bytes()


def test_validation_needs_no_mirrors(tmp_path, processes):
    found = made(processes, tmp_path, mirror=False)
    noise = torch.zeros(1, *SHAPE)
    assert np.load(found.arrays.folder / "moments.npy", mmap_mode="r").shape == (10, 1, 2, *SHAPE)
    with pytest.raises(ValueError, match="mirrored images were not encoded"):
        found.batch(torch.tensor([1]), torch.tensor([True]), noise)


def test_damaged_moments_are_encoded_again_and_a_line_says_so(tmp_path, processes, capsys):
    file = made(processes, tmp_path).arrays.folder / "moments.npy"
    whole = file.read_bytes()
    for damage in (b"no array", whole[:-8], whole[:300] + b"\x7f" + whole[301:]):
        file.write_bytes(damage)
        made(processes, tmp_path)
        assert file.read_bytes() == whole
        assert "made again" in capsys.readouterr().out


def test_noise_of_samples_leaves_every_other_draw_as_it_was():
    common = {"batch_size": 6, "images": 9, "shape": SHAPE, "steps": 100, "flip": True}
    plain, drawn = draw_batch(3, 5, **common), draw_batch(3, 5, **common, random=True)
    fixed = {"samples": 6, "images": 9, "shape": SHAPE, "steps": 100}
    pairs = [
        (plain, drawn),
        (
            fixed_draws(3, Stream.VALIDATION, **fixed),
            fixed_draws(3, Stream.VALIDATION, **fixed, random=True),
        ),
    ]
    for without, with_noise in pairs:
        assert without.noise is None
        for name in ("index", "flip", "t", "eps"):
            assert torch.equal(getattr(without, name), getattr(with_noise, name))
        assert with_noise.noise.shape == with_noise.eps.shape and not torch.equal(
            with_noise.noise, with_noise.eps
        )
    half = drawn.shard(1, 2)
    assert torch.equal(half.noise, drawn.noise[3:]) and plain.shard(1, 2).noise is None
