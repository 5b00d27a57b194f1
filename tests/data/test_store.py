"""Generated sets: resumable, never short, never somebody else's."""

from __future__ import annotations

import numpy as np
import pytest

from tdq_exp.data.store import ImageStore


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
    (tmp_path / "set" / "groups.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        make(tmp_path).missing()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ImageStore(tmp_path / "file" / "set", 4, 4, (2, 2, 1)).create()
