"""Real people's pictures and folders: orientation, transparency, links, formats, hold-outs."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image, ImageOps

from tdq_exp.data import cifar
from tdq_exp.data.decode import decode
from tdq_exp.data.images import load_images
from tdq_exp.data.sources import Folder
from tdq_exp.data.tables import Hub


def gray(level, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def loaded(source, cache, split="train", size=8):
    return load_images(source, split, size=size, channels=3, cache=str(cache)).pixels


@pytest.fixture
def folder(tmp_path):
    """A folder whose first file, which is the held-out one, is of no interest."""
    root = tmp_path / "images"
    root.mkdir()
    gray(7).save(root / "0.png")
    return root


def only(folder, tmp_path):
    """The one training image of a folder."""
    (pixels,) = loaded(Folder(str(folder), holdout=2), tmp_path / "cache")
    return pixels


def test_a_photograph_is_turned_as_its_camera_says(folder, tmp_path):
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (0, 0, 4, 8))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes up
    image.save(folder / "1.jpg", exif=exif, quality=100)

    pixels = only(folder, tmp_path)
    assert pixels[:3].min() > 200 and pixels[5:].max() < 50


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_colour_lies_behind_them(mode, folder, tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 4))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 0, 255, 0])
        image.paste(0, (0, 0, 8, 4))
        image.save(folder / "1.png", transparency=1)
    else:
        image.convert(mode).save(folder / "1.png")

    pixels = only(folder, tmp_path)
    assert (pixels[:4] == 0).all() and (pixels[4:] == 255).all()


def test_gray_of_16_bits_keeps_its_levels(folder, tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(folder / "1.png")
    assert (only(folder, tmp_path) == 128).all()


def test_numbers_without_black_and_white_are_refused(folder, tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "1.tif")
    with pytest.raises(ValueError, match=r"1\.tif: holds real numbers.*convert it to 8 bits"):
        only(folder, tmp_path)


def test_colours_that_need_a_profile_are_refused(folder, tmp_path):
    Image.new("LAB", (8, 8), (100, 20, 20)).save(folder / "1.tif")
    with pytest.raises(ValueError, match=r"1\.tif: holds the colours LAB.*convert it to RGB"):
        only(folder, tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, kind):
    picture = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, kind, exif=exif, lossless=True)

    expected = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(decode(file.getvalue(), "a picture"), expected)


def test_odd_exif_of_a_camera_does_not_keep_a_picture_from_being_turned():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 6, "camera"
    gray(9, (8, 4)).save(file, "JPEG", exif=exif)

    # A text where a number belongs: Pillow's own turn writes it back, and fails.
    odd = file.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x1f\x00\x02", 1)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(odd)))
    assert decode(odd, "a.jpg").size == (4, 8)


def test_tiff_and_the_first_frame_of_a_gif_are_read(folder, tmp_path):
    gray(50).save(folder / "1.tif")
    gray(60).save(folder / "2.gif", save_all=True, append_images=[gray(200)])
    gray(70).save(folder / "3.TIFF")
    found = loaded(Folder(str(folder), holdout=9), tmp_path / "cache")
    assert [int(image.mean()) for image in found] == [50, 60, 70]


def test_linked_folders_are_followed_once_and_nothing_is_left_out_silently(tmp_path):
    real, root = tmp_path / "real", tmp_path / "root"
    real.mkdir()
    root.mkdir()
    gray(1).save(real / "a.png")
    (real / "a.txt").write_text("a caption")
    (root / "class0").symlink_to(real)
    (root / "class0_again").symlink_to(real)
    (real / "up").symlink_to(root)
    gray(2).save(root / "b.png")
    (root / "README").write_text("")
    os.mkfifo(root / "pipe.png")
    (root / "._b.png").write_bytes(b"attributes")

    source = Folder(str(root))
    assert sorted(file.name for file in source.files) == ["a.png", "b.png"]
    (note,) = source.notes
    assert "2 images" in note
    for part in (
        "2 link to a folder",
        "1 .txt",
        "1 file without a suffix",
        "1 no regular",
        "1 file of attr",
    ):
        assert part in note


def test_folders_that_programs_leave_behind_are_neither_images_nor_classes(tmp_path):
    for place in ("a", "b", "b/.ipynb_checkpoints", "__MACOSX/a", "@eaDir"):
        (tmp_path / place).mkdir(parents=True)
        gray(1).save(tmp_path / place / "0.png")
    source = Folder(str(tmp_path), holdout=2)
    assert source.labels("validation") + source.labels("train") == [0, 1]
    assert source.in_subfolders and not Folder(str(tmp_path / "a")).in_subfolders
    assert "2 images; left out: 3 folder of a program's own" in source.notes[0]


def write_set(root, splits):
    root.mkdir(parents=True)
    for split, levels in splits.items():
        table = Dataset.from_dict(
            {"img": [gray(v) for v in levels]}, features=Features({"img": ImageColumn()})
        )
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return str(root)


def test_a_hub_set_with_a_train_split_only_has_every_20th_image_held_out(tmp_path, monkeypatch):
    path, cache = write_set(tmp_path / "set", {"train": range(40)}), tmp_path / "cache"
    source = Hub(path)
    train, held_out = (loaded(source, cache, split) for split in ("train", "validation"))
    assert held_out[:, 0, 0, 0].tolist() == [0, 20]
    assert sorted([*train[:, 0, 0, 0].tolist(), 0, 20]) == list(range(40))
    assert "no split 'test', so every 20th image of 'train' is held out" in source.notes[0]

    # The second time nobody is asked: the hub may be out of reach.
    monkeypatch.setattr(Hub, "_splits", lambda self: pytest.fail("asked"))
    again = Hub(path)
    assert len(loaded(again, cache)) == 38 and again.notes == source.notes


def test_a_split_that_is_named_is_taken_though_images_were_held_out_before(tmp_path):
    cache, splits = tmp_path / "c", {"train": range(40), "validation": range(100, 110)}
    path = write_set(tmp_path / "set", splits)
    assert len(loaded(Hub(path), cache)) == 38, "there is no split 'test'"
    named = Hub(path, validation="validation")
    assert loaded(named, cache, "validation")[:, 0, 0, 0].tolist() == list(range(100, 110))
    assert len(loaded(named, cache)) == 40 and not named.notes

    path = write_set(tmp_path / "both", {"train": range(40), "test": range(10)})
    assert len(loaded(Hub(path, holdout=20), cache)) == 38
    assert len(loaded(Hub(path, holdout=20), cache, "validation")) == 2
    assert len(loaded(Hub(path), cache, "validation")) == 10, "nobody asked for a hold-out"


def test_a_number_holds_images_out_whatever_the_splits_and_a_wrong_split_says_so(tmp_path):
    path = write_set(tmp_path / "set", {"train": range(4), "test": range(9)})
    assert len(loaded(Hub(path, holdout=2), tmp_path / "c", "validation")) == 2
    with pytest.raises(ValueError, match=r"data\.source\.holdout=1: at least 2"):
        Hub(path, holdout=1)
    with pytest.raises(ValueError, match=r"Unknown split.*data\.source\.train.*holdout=20"):
        loaded(Hub(path, train="trian"), tmp_path / "c")


def cifar_batch(levels):
    data = np.zeros((len(levels), 3072), np.uint8)
    data[:, 1024:2048] = np.array(levels)[:, None]  # green
    return {b"batch_label": b"b", b"labels": list(levels), b"data": data}


@pytest.fixture
def batches(tmp_path):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    (root / "batches.meta").write_bytes(b"")
    for i in range(1, 6):
        (root / f"data_batch_{i}").write_bytes(pickle.dumps(cifar_batch([i, i + 10]), protocol=2))
    (root / "test_batch").write_bytes(pickle.dumps(cifar_batch([99])))
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_cifar_is_read_as_torchvision_unpacks_it(parent, batches, tmp_path):
    source = Hub(str(batches.parent if parent else batches))
    train, test = (loaded(source, tmp_path / "c", s, size=32) for s in ("train", "validation"))
    assert train[:, 5, 7].tolist() == [[0, v, 0] for i in range(1, 6) for v in (i, i + 10)]
    assert test.shape == (1, 32, 32, 3) and (test[..., 1] == 99).all()
    with pytest.raises(ValueError, match="data=cifar10 reads it"):
        Folder(str(batches))

    # Each image with its class, also where some are held out of the training batches.
    assert source.labels("validation") == [99]
    assert source.labels("train") == [v for i in range(1, 6) for v in (i, i + 10)]
    part = Hub(str(batches), holdout=5)
    assert part.labels("validation") == [1, 13]
    assert loaded(part, tmp_path / "c", "validation", size=32)[:, 0, 0, 1].tolist() == [1, 13]


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


@pytest.mark.parametrize(
    "content",
    [Hostile(), {b"data": Hostile()}, {b"data": np.zeros((2, 3072))}, {b"data": b"x"}, {}, [1]],
    ids=["hostile", "inside", "floats", "bytes", "empty", "list"],
)
def test_a_batch_of_cifar_executes_nothing(content, batches, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "executed"))
    (batches / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="data_batch_2: damaged, or not a batch of CIFAR"):
        loaded(Hub(str(batches)), tmp_path / "c", size=32)
    assert not (tmp_path / "executed").exists()


def test_a_batch_that_is_cut_short_is_refused(batches):
    path = batches / "test_batch"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="test_batch: damaged"):
        cifar.read_batch(path)


class Database:
    """What `lmdb` gives, in memory."""

    def __init__(self, items):
        self.items = items

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def begin(self):
        return self

    def cursor(self):
        return iter(self.items)

    def stat(self):
        return {"entries": len(self.items)}


def test_a_database_of_lsun_is_read_or_one_line_says_how(folder, tmp_path, monkeypatch):
    root = tmp_path / "church_outdoor_train_lmdb"
    root.mkdir()
    (root / "data.mdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb; or convert"):
        Folder(str(root))
    with pytest.raises(ValueError, match="is an LMDB, which data=image_folder reads"):
        Hub(str(root))

    raw = (folder / "0.png").read_bytes()
    items = [(b"key%d" % i, raw) for i in range(5)] + [(b"bad", raw[:50])]
    fake = types.SimpleNamespace(open=lambda *_, **__: Database(items), Error=OSError)
    monkeypatch.setitem(sys.modules, "lmdb", fake)
    assert len(loaded(Folder(str(root), holdout=3), tmp_path / "c", "validation")) == 2
    with pytest.raises(ValueError, match=r"train_lmdb\[bad\]: not a whole image"):
        loaded(Folder(str(root), holdout=3), tmp_path / "c")
