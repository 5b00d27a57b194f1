"""Files of tensors: whatever happens to one, it is refused or gives what was written."""

from __future__ import annotations

import pickle
import resource

import pytest
import torch

from tdq_exp.fit import checkpoint
from tdq_exp.runtime import files, tensor_files

TENSORS = {"b": torch.arange(6).reshape(2, 3), "a": torch.tensor([1.5, -2.0]), "c": torch.tensor(7)}
METADATA = {"fit": "0123456789abcdef", "update": "3"}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.safetensors"
    tensor_files.write_tensors(path, TENSORS, METADATA)
    return path


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "state.pt"
    tensor_files.write_state(path, {"net": TENSORS, "update": 3, "best": [(0.5, 2)]})
    return path


def same(found):
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in TENSORS.items()
    )


def refused_or(path, read, right):
    """Whether reading a file is refused in one line, or gives the right thing."""
    try:
        return right(read(path))
    except ValueError as error:
        return str(error).startswith(f"{path}: damaged") and "\n" not in str(error)


def damages(whole, every=1):
    """A file with one flipped bit, at every so many-th byte; then cut short everywhere."""
    for place in range(0, len(whole), every):
        yield whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        yield whole[: place + 1]
    yield from (b"", b"{}", b"[]")


def test_tensors_come_back_with_what_was_said_of_them(weights, tmp_path):
    found = tensor_files.read_tensors(weights)
    assert same(found.tensors) and found.metadata == METADATA and found.checked
    again = tmp_path / "again.safetensors"
    tensor_files.write_tensors(again, dict(reversed(TENSORS.items())), METADATA)
    assert again.read_bytes() == weights.read_bytes()


def test_no_flipped_bit_and_no_cut_of_a_safetensors_file_goes_unnoticed(weights):
    for content in damages(weights.read_bytes(), every=5):
        weights.write_bytes(content)
        assert refused_or(
            weights,
            tensor_files.read_tensors,
            lambda found: same(found.tensors) and found.metadata == METADATA,
        ), content


def test_no_flipped_bit_and_no_cut_of_a_state_goes_unnoticed(state):
    def right(found):
        return same(found["net"]) and found["update"] == 3 and found["best"] == [(0.5, 2)]

    assert right(tensor_files.read_state(state)) and tensor_files.check_state(state)
    for content in damages(state.read_bytes(), every=41):
        state.write_bytes(content)
        assert refused_or(state, tensor_files.read_state, right)


def test_files_of_others_have_no_checksum_and_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "w.safetensors")
    torch.save(TENSORS, tmp_path / "w.pt")
    found = tensor_files.read_tensors(tmp_path / "w.safetensors")
    assert same(found.tensors) and not found.checked
    assert same(tensor_files.read_state(tmp_path / "w.pt"))
    assert not tensor_files.check_state(tmp_path / "w.pt")


def test_nothing_that_a_state_holds_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"net": Attack()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"net": Attack()}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match=rf"{name}: damaged"):
            tensor_files.read_state(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.json"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, name):
    write = {
        "w.safetensors": lambda path, big: tensor_files.write_tensors(path, {"x": big}, {}),
        "w.pt": lambda path, big: tensor_files.write_state(path, {"x": big}),
        "w.json": lambda path, big: files.write_json(path, {"x": big.tolist()}),
    }[name]
    path = tmp_path / name
    write(path, torch.zeros(3))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(
            OSError, match=rf"{name}: can't be written \(.*\); free space"
        ) as caught:
            write(path, torch.zeros(30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_damaged_state_is_replaced_by_the_earlier_one_then_by_none(tmp_path, capsys):
    path = tmp_path / "state.pt"
    for update in (1, 2, 3):
        checkpoint.save_state(path, {"update": update}, keep_earlier=True)
    earlier = checkpoint.earlier_file(path)
    assert tensor_files.read_state(checkpoint.whole_state(path))["update"] == 3

    path.write_bytes(path.read_bytes()[:-60])
    assert checkpoint.whole_state(path) == earlier and not path.exists()
    assert tensor_files.read_state(earlier)["update"] == 2
    assert "goes on from an earlier state" in capsys.readouterr().out

    earlier.write_bytes(b"[]")
    assert checkpoint.whole_state(path) is None
