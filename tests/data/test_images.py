"""Images in: caches, splits, resizing, and every kind of bad folder."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from tdq_exp.data.images import Images, load_images, resize_center, to_uint8
from tdq_exp.data.sources import Digits, Folder
from tdq_exp.data.tables import Hub


def picture(seed, size=(12, 9)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "nested").mkdir(parents=True)
    for i in range(12):
        picture(i).save(root / ("nested" if i % 2 else ".") / f"{i:02d}.png")
    return root


def test_digits_are_split_without_overlap_and_nothing_is_lost():
    train = load_images(Digits(), "train", size=8, channels=1)
    held_out = load_images(Digits(), "validation", size=8, channels=1)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.shape == (1, 8, 8)
    assert train.content != held_out.content
    assert train.pixels.max() == 255


def test_a_cache_is_decoded_once_and_again_when_a_file_changes(folder, tmp_path, monkeypatch):
    kwargs = {"size": 8, "channels": 3, "cache": str(tmp_path / "cache")}
    first = load_images(Folder(str(folder), holdout=4), "train", **kwargs)
    monkeypatch.setattr(Folder, "read", lambda self, split: pytest.fail("decoded twice"))
    assert load_images(Folder(str(folder), holdout=4), "train", **kwargs).content == first.content
    monkeypatch.undo()
    picture(99).save(folder / "02.png")
    assert load_images(Folder(str(folder), holdout=4), "train", **kwargs).content != first.content


def test_a_cache_is_what_numpy_writes_and_its_hash_is_of_shape_and_pixels(folder, tmp_path):
    source = Folder(str(folder), holdout=4)
    found = load_images(source, "train", size=8, channels=3, cache=str(tmp_path / "cache"))
    (path,) = (tmp_path / "cache").rglob("*.npy")
    np.save(tmp_path / "whole.npy", np.array(found.pixels))
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    whole = repr(found.pixels.shape).encode() + found.pixels.tobytes()
    assert found.content == hashlib.sha256(whole).hexdigest()[:16]  # as every row so far cites it


def test_a_limit_takes_the_first_images_and_has_a_cache_of_its_own(folder, tmp_path):
    kwargs = {"size": 8, "channels": 3, "cache": str(tmp_path / "cache")}
    whole, few, more = (
        load_images(Folder(str(folder), holdout=4), "train", **kwargs, limit=n)
        for n in (None, 5, 99)
    )
    assert (len(whole), len(few)) == (9, 5)
    assert (
        np.array_equal(few.pixels, whole.pixels[:5])
        and few.content != whole.content == more.content
    )


def test_images_are_written_as_they_are_decoded(folder, tmp_path, monkeypatch):
    # A set may be larger than the memory: at the last image the file holds all others.
    sizes = []

    def watched(self, split, read=Folder.read):
        for image in read(self, split):
            sizes.extend(f.stat().st_size for f in (tmp_path / "cache" / "images").iterdir())
            yield image

    monkeypatch.setattr(Folder, "read", watched)
    load_images(
        Folder(str(folder), holdout=4), "train", size=64, channels=3, cache=str(tmp_path / "cache")
    )
    assert len(sizes) == 9 and sizes[-1] >= 7 * 64 * 64 * 3


def test_train_and_validation_of_a_folder_never_mix(folder):
    source = Folder(str(folder), holdout=4)
    train, held_out = set(source._of("train")), set(source._of("validation"))
    assert not train & held_out
    assert len(train | held_out) == 12


def test_content_is_the_pixels_and_not_the_path(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    here = load_images(
        Folder(str(moved), holdout=4), "train", size=8, channels=3, cache=str(tmp_path / "a")
    )
    moved.rename(folder)
    there = load_images(
        Folder(str(folder), holdout=4), "train", size=8, channels=3, cache=str(tmp_path / "b")
    )
    assert here.content == there.content


def test_a_local_copy_of_a_hub_data_set_is_read_through_datasets(tmp_path):
    rows = {"img": [picture(i, (32, 32)) for i in range(6)], "label": list(range(6))}
    features = Features({"img": ImageColumn(), "label": Value("int64")})
    root = tmp_path / "set" / "plain_text"
    root.mkdir(parents=True)
    for split, part in (("train", slice(0, 4)), ("test", slice(4, 6))):
        table = Dataset.from_dict({k: v[part] for k, v in rows.items()}, features=features)
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    source = Hub(str(tmp_path / "set"))
    train = load_images(source, "train", size=32, channels=3, cache=str(tmp_path / "c"))
    held_out = load_images(source, "validation", size=32, channels=3, cache=str(tmp_path / "c"))
    assert (len(train), len(held_out)) == (4, 2)
    assert np.array_equal(train.pixels[3], np.asarray(rows["img"][3]))


def test_resizing_is_antialiased_and_centred():
    stripes = np.zeros((32, 48, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: any resampling without antialiasing gives 0 or 255
    small = np.asarray(resize_center(Image.fromarray(stripes), 8)).astype(int)
    assert small.shape == (8, 8, 3)
    assert abs(small[2:-2, 2:-2] - 127).max() < 20
    edges = np.zeros((8, 16, 3), np.uint8)
    edges[:, 4:12] = 200
    assert (np.asarray(resize_center(Image.fromarray(edges), 8)) == 200).all()


def test_flips_mirror_left_to_right_and_pixels_map_to_minus_one_and_one():
    pixels = np.zeros((1, 2, 2, 1), np.uint8)
    pixels[0, 0, 0] = 255
    images = Images(pixels, "x", "y")
    index = torch.tensor([0, 0])
    x = images.batch(index, torch.tensor([False, True]))
    assert x[0, 0].tolist() == [[1, -1], [-1, -1]]
    assert x[1, 0].tolist() == [[-1, 1], [-1, -1]]


def test_pixels_are_rounded_and_the_habit_truncates():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 5.0]).reshape(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(x, truncate=True).flatten().tolist() == [0, 0, 127, 254, 255, 255]
    every = torch.arange(256).reshape(1, 1, 16, 16).float() / 127.5 - 1
    assert to_uint8(every).flatten().tolist() == list(range(256))


def test_nan_is_no_pixel():
    x = torch.zeros(4, 1, 2, 2)
    x[1:3, 0, 1, 1] = math.nan
    with pytest.raises(FloatingPointError, match="2 of 4 images hold NaN"):
        to_uint8(x)
    assert int(to_uint8(torch.full((1, 1, 1, 1), math.inf))) == 255


def broken(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil",
    [broken, lambda path: path.write_bytes(b"no image"), lambda path: path.write_bytes(b"")],
)
def test_a_truncated_or_foreign_file_is_one_line_that_names_it(folder, tmp_path, spoil):
    spoil(folder / "nested" / "03.png")
    with pytest.raises(ValueError, match=r"03\.png: not a whole image") as caught:
        load_images(
            Folder(str(folder), holdout=4),
            "train",
            size=8,
            channels=3,
            cache=str(tmp_path / "cache"),
        )
    assert "\n" not in str(caught.value)
    assert not [
        f for f in (tmp_path / "cache").rglob("*") if f.is_file()
    ]  # nothing half made is left


def test_empty_and_missing_folders_are_errors_that_name_the_key(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (Folder, Hub):
        with pytest.raises(ValueError, match=r"data\.source\.path=.*empty"):
            source(str(tmp_path / "empty"))
        with pytest.raises(FileNotFoundError, match=r"data\.source\.path=.*missing"):
            source(str(tmp_path / "missing"))


def test_a_corrupt_parquet_file_is_one_line(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"data\.source\.path") as caught:
        load_images(
            Hub(str(tmp_path / "set")), "train", size=8, channels=3, cache=str(tmp_path / "cache")
        )
    assert "\n" not in str(caught.value)


def test_what_was_done_to_a_published_set_before_is_part_of_the_protocol(folder, tmp_path):
    source, options = (
        Folder(str(folder), holdout=4),
        {"size": 8, "channels": 3, "cache": str(tmp_path / "cache")},
    )
    assert load_images(source, "train", **options).protocol == "centre crop, bicubic to 8x8x3"
    source.prepared = "8x8 as published"
    assert (
        load_images(source, "train", **options).protocol
        == "8x8 as published, centre crop, bicubic to 8x8x3"
    )


def test_a_link_to_nothing_and_an_image_of_absurd_size_are_named(folder, tmp_path, monkeypatch):
    (folder / "a_link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"a_link\.png: can't be read"):
        load_images(
            Folder(str(folder), holdout=4), "train", size=8, channels=3, cache=str(tmp_path / "c")
        )
    (folder / "a_link.png").unlink()
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"not a whole image \(Image size"):
        load_images(
            Folder(str(folder), holdout=4), "train", size=8, channels=3, cache=str(tmp_path / "c")
        )
