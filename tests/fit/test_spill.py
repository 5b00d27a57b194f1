"""Rows in memory and rows in a file: the same numbers, and an error that names the file."""

import errno
import os

import pytest
import torch

from tdq_exp.fit.ptq.capture import Spill, needed_bytes
from tests.quant.builders import randn

SHAPES = [(3, 4, 5), (7,), ()]


def made(tmp_path, where, shape=(3, 4, 5), rows=20):
    return Spill(rows, shape, tmp_path / "rows" if where == "file" else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_and_file_give_back_the_same_rows(tmp_path, shape):
    values = randn(20, *shape)
    stores = [made(tmp_path, where, shape) for where in ("memory", "file")]
    for store in stores:
        for first in (8, 0, 16):  # in any order, the last part shorter
            store.put(first, values[first : first + 8])
    for index in (
        torch.arange(20),
        torch.tensor([19, 0, 7, 7, 3]),
        torch.tensor([5]),
        torch.tensor([]).long(),
    ):
        for store in stores:
            found = store.take(index)
            assert found.dtype == torch.float32
            assert torch.equal(found, values[index])
    for store in stores:
        store.close()
    assert (tmp_path / "rows").stat().st_size == values.numel() * 4


@pytest.mark.parametrize("where", ["memory", "file"])
def test_anything_is_stored_in_single_precision_whatever_its_type_and_layout(tmp_path, where):
    store = made(tmp_path, where)
    values = randn(20, 3, 4, 5).double().to(memory_format=torch.channels_last).requires_grad_()
    store.put(0, values)
    found = store.take(torch.arange(20))
    assert not found.requires_grad
    assert torch.equal(found, values.detach().float())


@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_is_taken_is_a_copy(tmp_path, where):
    store = made(tmp_path, where)
    store.put(0, torch.ones(20, 3, 4, 5))
    store.take(torch.arange(20)).zero_()
    assert store.take(torch.arange(20)).min() == 1


def test_two_writers_share_one_file(tmp_path):
    values = randn(20, 6)
    one, other = (Spill(20, (6,), tmp_path / "rows") for _ in range(2))
    one.put(0, values[:9])
    other.put(9, values[9:])
    assert torch.equal(one.take(torch.arange(20)), values)
    assert torch.equal(other.take(torch.tensor([2, 12])), values[[2, 12]])


@pytest.mark.parametrize("cut", [1, 4 * 60, 4 * 60 * 20])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, cut):
    store = made(tmp_path, "file")
    store.put(0, randn(20, 3, 4, 5))
    os.truncate(tmp_path / "rows", 4 * 60 * 20 - cut)
    with pytest.raises(OSError, match=r"rows: ends early; run the same command again$"):
        store.take(torch.tensor([19]))
    if cut <= 4 * 60:
        assert store.take(torch.tensor([18])).shape == (
            1,
            3,
            4,
            5,
        )  # the rows before are still whole


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    store = made(tmp_path, "file")

    def full(handle, data, at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        OSError, match=r"rows: can't be written \(No space left on device\); free space or set out="
    ):
        store.put(0, randn(20, 3, 4, 5))


def test_a_write_in_pieces_arrives_whole(tmp_path, monkeypatch):
    store, values, write = made(tmp_path, "file"), randn(20, 3, 4, 5), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: write(handle, data[:1000], at))
    store.put(0, values)
    assert torch.equal(store.take(torch.arange(20)), values)


def test_closing_lets_go_of_the_file_and_of_the_memory(tmp_path):
    handles = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    store = made(tmp_path, "file")
    store.put(0, randn(20, 3, 4, 5))
    store.close()
    store.close()  # and once more
    if handles is not None:
        assert len(os.listdir("/proc/self/fd")) == handles
    assert (tmp_path / "rows").exists()  # its owner removes it


def test_needed_bytes_are_what_the_files_take(tmp_path):
    shapes = [(3, 4, 5), (7,), ()]
    for number, shape in enumerate(shapes):
        Spill(20, shape, tmp_path / str(number)).put(0, randn(20, *shape))
    assert needed_bytes(20, shapes) == sum(
        (tmp_path / str(number)).stat().st_size for number in range(3)
    )
