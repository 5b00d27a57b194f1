"""Anybody's images: the numbers of the same images as an array, as pictures and as statistics."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdq_exp.commands import measure
from tdq_exp.data import given
from tdq_exp.data.arrays import ImageStore
from tdq_exp.metrics.features import FeatureNetwork
from tdq_exp.metrics.fidelity import Statistics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(pixels, tmp_path_factory):
    """The images as pictures, in two folders."""
    path = tmp_path_factory.mktemp("pictures")
    (path / "b").mkdir()
    for number, image in enumerate(pixels):
        place = path / "b" if number >= 20 else path / "a.dir"
        place.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{number:02}.png")
    return path


def test_pictures_and_arrays_are_the_same_images(pixels, folder, tmp_path):
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "b.npz", images=pixels[..., 0], labels=np.arange(24))
    for path in (folder, tmp_path / "a.npy", tmp_path / "b.npz"):
        found = given.read(path, 8, 1)
        assert (found.count, found.size) == (24, (8, 8))
        assert np.array_equal(found.piece(3, 22), pixels[3:22])


def test_the_grid_that_sample_draws_beside_its_images_is_none_of_them(pixels, tmp_path):
    for name in ("00000", "00001", "grid"):
        Image.fromarray(pixels[0, ..., 0]).save(tmp_path / f"{name}.png")
    found = given.read(tmp_path, 8, 1)
    assert found.count == 2 and "1 grid.png left out" in found.notes[-1]

    (tmp_path / "00000.png").unlink()
    (tmp_path / "00001.png").unlink()
    with pytest.raises(ValueError, match="holds no picture but grid.png"):
        given.read(tmp_path, 8, 1)


def test_the_set_of_a_run_is_measured_by_its_folder_and_only_when_it_is_finished(pixels, tmp_path):
    store = ImageStore(tmp_path / "images", 24, 10, (8, 8, 1), of="a set")
    store.create()
    for group in range(2):
        store.put(group, pixels[10 * group : 10 * group + 10])
    places = (tmp_path, tmp_path / "images", tmp_path / "images" / "images.npy")
    for place in places:
        with pytest.raises(ValueError, match=r"images.npy: 1 of 3 groups of images are missing"):
            given.read(place, 8, 1)

    store.put(2, pixels[20:])
    Image.fromarray(pixels[0, ..., 0]).save(tmp_path / "grid.png")
    for place in places:
        found = given.read(place, 8, 1)
        assert found.count == 24 and np.array_equal(found.piece(0, 24), pixels)


def test_the_charts_of_a_run_are_no_images(pixels, tmp_path):
    run = tmp_path / "a_run" / "seed0"
    run.mkdir(parents=True)
    (run / "fit.json").touch()
    for name in ("intervals", "others"):
        Image.fromarray(pixels[0, ..., 0]).save(run / f"{name}.png")
    for place in (run, tmp_path):
        with pytest.raises(ValueError, match="seed0: is a run; name the folder of a set"):
            given.read(place, 8, 1)

    # A tracker's pictures lie deeper; nor are two sets one.
    (run / "wandb").mkdir()
    for name in ("intervals", "others"):
        (run / f"{name}.png").rename(run / "wandb" / f"{name}.png")
    with pytest.raises(ValueError, match="seed0: is a run"):
        given.read(run, 8, 1)
    (run / "fit.json").unlink()
    for name in ("ddim4_n12", "ddim8_n12"):
        (run / name).mkdir()
        (run / name / "samples.json").touch()
    with pytest.raises(ValueError, match="holds 2 sets of a run; name one: .*ddim4_n12"):
        given.read(run, 8, 1)


def test_every_size_in_a_folder_is_told_not_only_the_firsts(tmp_path):
    for name, size in (("a", (8, 8)), ("b", (20, 10)), ("c", (30, 40))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    found = given.read(tmp_path, 8, 1)
    assert found.piece(0, 3).shape == (3, 8, 8, 1)
    assert measure._sizes(found) == "3 sizes, 8x8 to 40x30"


def test_larger_coloured_images_become_the_references_size(tmp_path):
    large = np.full((2, 20, 30, 3), 100, np.uint8)
    np.save(tmp_path / "large.npy", large)
    found = given.read(tmp_path / "large.npy", 8, 1)
    assert found.size == (20, 30) and np.array_equal(
        found.piece(0, 2), np.full((2, 8, 8, 1), 100, np.uint8)
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.npy", np.zeros((2, 8, 8, 1)), "float64; expected uint8"),
        ("a.npy", np.zeros((2, 8), np.uint8), "expected \\[N, H, W, C\\]"),
        ("a.npy", np.zeros((0, 8, 8, 3), np.uint8), "expected \\[N, H, W, C\\]"),
        ("a.npy", np.zeros((8, 8, 3), np.uint8), "that of one image \\[H, W, C\\]"),
        ("a.npy", b"\x93NUMPY\x01\x00\x08\x00{'descr'", "a.npy: "),
        ("a.npy", b"nothing", "a.npy: "),
        ("a.npz", b"nothing", "a.npz: "),
        ("a.npz", {"x": np.zeros(3)}, "holds x; expected one uint8 array"),
        ("a.npz", {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "no mean \\[D\\]"),
        ("a.npz", {"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ("a.npz", {"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1.0]])}, "no covariance"),
        ("a.npz", {"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ("a.npz", {"mu": np.zeros(2), "sigma": np.eye(2) * 1j}, "expected real numbers"),
        ("a.npz", {"mu": np.zeros(2), "sigma": np.eye(2).astype(str)}, "expected real numbers"),
        ("a.npz", {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "expected real numbers"),
        ("a.txt", b"", "no folder of pictures"),
        ("pictures/a.png", b"\x89PNG broken", "a.png: not a whole image"),
        ("pictures/a.txt", b"", "holds no .png"),
    ],
)
def test_what_can_not_be_read_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        given.read(path.parent if "pictures" in name else path, 8, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_a_file_holds_counts_and_not_its_suffix(suffix, pixels, tmp_path):
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        np.savez(file, pixels) if suffix == ".npy" else np.save(file, pixels)
    assert np.array_equal(given.read(path, 8, 1).piece(3, 22), pixels[3:22])


def test_a_damaged_archive_is_one_line_wherever_the_damage_is(pixels, tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, pixels[:4])
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02")  # the archive's list: flags, then the compression's number

    for place in (0, 80, entry + 8, entry + 10, len(whole) - 10):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"^{path}: "):
            given.read(path, 8, 1)


def test_a_pickle_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy: is no array of numbers"):
        given.read(tmp_path / "a.npy", 8, 1)


def test_sets_are_measured_beside_the_rows(inside, pixels, folder, tmp_path, monkeypatch):
    run = ROOT / "results" / "runs" / "digits_w4a4_lsq"
    shutil.copytree(run, tmp_path / "results" / "runs" / run.name)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "few.npy", pixels[:3])
    monkeypatch.setenv("HOME", str(tmp_path))
    command = [str(folder), "a.npy", "few.npy", "--model", "digits", "--json=~/a.json", "--cpu"]
    command += ["eval.metrics=[fid]"]

    rounded, extract = [], FeatureNetwork.extract

    def noted(*arguments, **options):
        rounded.append(torch.backends.cudnn.allow_tf32)
        return extract(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", True)
        patch.setattr(FeatureNetwork, "extract", noted)
        done = inside(*command, verb="measure")
    assert done.returncode == 0, done.stderr
    notes = " ".join(done.stdout.split())
    assert "few.npy: the Frechet distance of 3 images by 64 features is mostly bias" in notes
    assert rounded and not any(rounded), "features of rows are computed in float32 on a GPU"
    assert "digits_w4a4_lsq ddim50_n1000" in done.stdout and "1437 reference images" in done.stdout

    measured = json.loads((tmp_path / "a.json").read_text())
    by_folder, by_array = measured["sets"][str(folder)], measured["sets"]["a.npy"]
    assert by_folder == by_array and by_array["images"] == 24 and by_array["deviation"] > 0
    assert set(measured["sets"]["few.npy"]) == {"images", "fid"}, "halves of 3 have no covariance"

    # Statistics of the same features are at the same distance.
    from tdq_exp.config.compose import compose
    from tdq_exp.experiment.build import features_of

    network = features_of(compose(["model=digits"]))
    vectors = network.extract(pixels, 50, torch.device("cpu"), lambda images: None)
    mine = Statistics.of(vectors[network.metric_layers["fid"]])
    np.savez(tmp_path / "s.npz", mu=mine.mu, sigma=mine.sigma)
    done = inside("s.npz", "--model", "digits", "--json", "s.json", "--cpu", verb="measure")
    assert done.returncode == 0, done.stderr
    assert "s.npz does not say of which features" in " ".join(done.stdout.split())
    measured = json.loads((tmp_path / "s.json").read_text())["sets"]["s.npz"]
    assert measured == {"fid": pytest.approx(by_array["fid"], rel=1e-4)}


@pytest.mark.parametrize(
    "command, message",
    [
        (["no.npy", "--model", "digits"], "no.npy: no such file"),
        (["data.limit=3", "--model", "digits"], "name a folder"),
        (["a", "--model", "digits", "--images", "0"], "--images=0"),
    ],
)
def test_a_mistake_is_one_line(inside, command, message):
    done = inside(*command, verb="measure")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
