"""Generated sets: resumable, never short, never somebody else's."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tdq_exp.data.arrays import ImageStore


def make(tmp_path, images=10, batch=4):
    store = ImageStore(tmp_path / "set", images, batch, (2, 2, 1))
    store.create()
    return store


def group(number):
    return np.full((4, 2, 2, 1), number + 1, np.uint8)


def test_groups_in_any_order_make_the_set_and_padding_is_dropped(tmp_path):
    store = make(tmp_path)
    for number in (2, 0, 1):
        store.put(number, group(number))
    assert store.missing() == []
    assert store.read()[:, 0, 0, 0].tolist() == [1] * 4 + [2] * 4 + [3] * 2


def test_fewer_images_than_asked_are_an_error_and_never_a_number(tmp_path):
    store = make(tmp_path)
    store.put(1, group(1))
    assert store.missing() == [0, 2]
    with pytest.raises(ValueError, match="2 of 3 groups of images are missing"):
        store.read()


def test_what_is_there_stays_when_the_store_is_opened_again(tmp_path):
    make(tmp_path).put(1, group(1))
    again = make(tmp_path)
    assert again.missing() == [0, 2]


def test_another_set_in_the_same_folder_and_a_damaged_file_are_errors(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=r"groups\.npy: holds"):
        make(tmp_path, images=30).missing()


@pytest.mark.parametrize("file", ["images", "groups"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "longer", "header", "rows", "{}", "gone", "pipe"]
)
def test_damaged_files_lose_their_groups_and_nothing_damaged_is_read(
    tmp_path, file, damage, capsys
):
    store = make(tmp_path)
    for number in range(3):
        store.put(number, group(number))
    path = tmp_path / "set" / f"{file}.npy"
    whole = path.read_bytes()
    last = len(whole) - 2
    spoilt = {
        "empty": b"",
        "cut": whole[:-7],
        "longer": whole + b"1",
        "header": b"\x13" + whole[1:],
        "rows": whole[:last] + bytes([whole[last] ^ 4]) + whole[last + 1 :],
        "{}": b"{}",
    }
    if damage in spoilt:
        path.write_bytes(spoilt[damage])
    else:
        path.unlink()
    if damage == "pipe":
        os.mkfifo(path)

    assert store.faults()
    with pytest.raises(ValueError):
        store.read()
    store.create()
    missing = store.missing()
    assert missing == ([2] if damage == "rows" else [0, 1, 2])
    assert damage == "gone" or "made again" in capsys.readouterr().out
    for number in missing:
        store.put(number, group(number))
    assert path.read_bytes() == whole and not store.faults()


def test_a_map_without_checksums_is_one_of_an_earlier_version_and_made_anew(tmp_path, capsys):
    store = make(tmp_path)
    store.put(0, group(0))
    np.save(tmp_path / "set" / "groups.npy", np.array([1, 0, 0], np.uint8))
    store.create()
    assert store.missing() == [0, 1, 2]
    assert "earlier version" in capsys.readouterr().out


def test_files_of_another_set_do_not_match_and_those_of_an_earlier_version_do(tmp_path):
    store = make(tmp_path)
    for number in range(3):
        store.put(number, group(number))
    other = ImageStore(tmp_path / "set", 10, 4, (2, 2, 1), of="another set")
    assert other.arrays.damaged() == [0, 1, 2] and "3 of 3 groups are damaged" in other.faults()[0]

    # An earlier version counted the rows alone.
    path = tmp_path / "set" / "groups.npy"
    entries = [store.arrays._entry({"images": rows}, named=False) for rows in split(store)]
    np.save(path, np.array(entries, np.uint64))
    assert not store.faults() and not other.faults()


def split(store):
    images = store.arrays.read("images")
    return [images[start : start + 4] for start in range(0, 10, 4)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ImageStore(tmp_path / "file" / "set", 4, 4, (2, 2, 1)).create()


def test_images_that_were_deleted_are_missing_whatever_the_map_says(tmp_path):
    store = make(tmp_path)
    for number in range(3):
        store.put(number, group(number))
    (tmp_path / "set" / "images.npy").unlink()
    again = make(tmp_path)
    assert again.missing() == [0, 1, 2]
    with pytest.raises(ValueError, match="3 of 3 groups"):
        again.read()


def test_files_that_another_run_made_meanwhile_are_kept(tmp_path, monkeypatch):
    write, seen = np.lib.format.write_array, []

    def slow(file, array):
        if (
            not seen
        ):  # while the first run writes its zeros, a second one begins, and finishes a group
            seen.append(file.name)
            make(tmp_path).put(0, group(0))
        write(file, array)

    monkeypatch.setattr(np.lib.format, "write_array", slow)
    store = make(tmp_path)
    assert seen and store.missing() == [1, 2]
    assert int(np.load(tmp_path / "set" / "images.npy")[0, 0, 0, 0]) == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "groups.npy",
        "images.npy",
    ]
