"""Fingerprints and rows."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
import torch

from tdq_exp.fit.quantized import layer_record
from tdq_exp.models.weights.fill import state_hash
from tdq_exp.runtime import environment, files, stage
from tdq_exp.runtime.hashes import tensor_hash


def test_a_fingerprint_depends_on_values_and_not_on_their_order():
    assert files.fingerprint({"a": 1, "b": [1, 2]}) == files.fingerprint({"b": [1, 2], "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": "1"})


def test_differences_name_the_leaves():
    old, new = {"fit": {"lr": 1, "x": 2}, "gone": 1}, {"fit": {"lr": 3, "x": 2}, "new": 1}
    assert stage.differences(old, new) == ["fit.lr: 1 -> 3", "gone: 1 -> None", "new: None -> 1"]


def test_the_same_parts_are_found_and_others_are_refused(tmp_path):
    file, parts = tmp_path / "run" / "fit.json", {"fit": {"lr": 0.1, "batch": (1, 2)}}
    assert stage.check_same(file, parts) is None
    files.write_json(file, {"fingerprint": files.fingerprint(parts), "parts": parts})
    assert stage.check_same(file, parts)["parts"]["fit"]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"fit\.lr: 0\.1 -> 0\.2\).*label=NAME"):
        stage.check_same(file, {"fit": {"lr": 0.2, "batch": (1, 2)}})


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "fit.json").write_text('{"fingerprint": ')
    with pytest.raises(ValueError, match=r"fit\.json: damaged"):
        files.read_json(tmp_path / "fit.json")


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    file = tmp_path / "fit.json"
    files.write_json(file, {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(
        OSError, match=r"fit\.json: can't be written \(No space left on device\); free space"
    ):
        files.write_json(file, {"a": 2})
    assert files.read_json(file) == {"a": 1}


def test_after_a_failure_nothing_is_left_beside_the_target(tmp_path):
    with pytest.raises(ValueError, match="stop"), files.replacing(tmp_path / "a" / "x.bin") as part:
        part.write_bytes(b"half")
        raise ValueError("stop")
    assert list((tmp_path / "a").iterdir()) == []


def test_two_runs_can_write_the_same_target_at_once(tmp_path):
    target = tmp_path / "x.bin"
    with files.replacing(target) as one:
        one.write_bytes(b"one")
        with files.replacing(target) as two:
            two.write_bytes(b"two")
        assert one != two and target.read_bytes() == b"two"
    assert target.read_bytes() == b"one"

    with files.replacing(target, keep_other=True) as late:
        late.write_bytes(b"late")
    assert target.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [target]


def test_only_old_part_files_of_the_same_target_are_removed(tmp_path):
    old, new, other = (
        tmp_path / name for name in (".x.json.1.part", ".x.json.2.part", ".y.json.1.part")
    )
    for part in (old, new, other):
        part.write_bytes(b"half")
    for part in (old, other):
        os.utime(part, (0, 0))
    files.write_json(tmp_path / "x.json", {})
    assert not old.exists() and new.exists() and other.exists()


def test_hashes_of_tensors_do_not_depend_on_layout_and_keep_both_spellings_of_a_shape():
    x = torch.arange(12.0).reshape(3, 4)
    assert tensor_hash({"x": x.T.contiguous().T, "b": x}) == tensor_hash({"b": x, "x": x})
    assert tensor_hash({"x": x}) == state_hash({"x": x}) != tensor_hash({"x": x}, tuple)
    # Frozen: models' weights are recorded by the first, feature networks' by the second.
    assert tensor_hash({"x": x}) == "5732d96cf499f118"
    assert tensor_hash({"x": x}, tuple) == "1adda017029da7dd"


def test_the_environment_says_where_a_number_comes_from():
    found = environment.environment()
    assert found["versions"]["torch"]
    assert found["machine"]
    assert environment.peak_memory_gb() > 0.01


def test_the_compiler_of_kernels_is_named_where_one_was_used(monkeypatch):
    """Rows of a CPU stay as they are, whether it is installed or not."""
    monkeypatch.setattr(environment, "accelerator", lambda device: "a card")
    monkeypatch.setattr(environment, "version", lambda package: f"{package} 1")
    named = environment.environment.__wrapped__  # what was found before is kept
    assert named("cuda")["versions"]["triton"] == "triton 1"
    assert named("cuda")["accelerator"] == "a card"
    for device in (None, "cpu"):
        assert named(device)["versions"].keys() == {*environment.PACKAGES}
        assert "accelerator" not in named(device)


def test_no_flipped_bit_of_a_sealed_file_goes_unnoticed(tmp_path):
    file, content = tmp_path / "fit.json", {"fid": 10.25, "parts": {"lr": 1e-3}, "name": "x"}
    files.write_json(file, content)
    whole = file.read_bytes()
    assert files.read_json(file, must_be_sealed=True) == content
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(
                whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
            )
            try:
                assert files.read_json(file) == content  # another space, or line end
            except ValueError as error:
                assert str(error).startswith(f"{file}: damaged") and "\n" not in str(error)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "", "\xff", '{"parts": {}}'])
def test_what_is_no_record_is_one_line(tmp_path, text):
    (tmp_path / "fit.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"fit\.json: damaged \(.*\); remove it"):
        stage.read_record(tmp_path / "fit.json")


def test_a_record_without_a_seal_is_read_but_where_it_must_have_one(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"rows": []}')
    assert files.read_json(file) == {"rows": []}
    with pytest.raises(ValueError, match=r"metrics\.json: has no seal; .*migrate_records\.py"):
        files.read_json(file, must_be_sealed=True)


def test_a_fingerprint_of_other_parts_is_damage(tmp_path):
    file = tmp_path / "fit.json"
    files.write_json(file, {"fingerprint": "0" * 16, "parts": {"fit": {"lr": 0.1}}})
    with pytest.raises(ValueError, match="its fingerprint is not that of its parts"):
        stage.check_same(file, {"fit": {"lr": 0.1}})


def test_an_older_record_in_other_names_is_told_to_be_migrated(tmp_path):
    old, new = {"tdq": {"offset": "learned"}}, {"tdq": {"zero_point": "learned"}}
    files.write_json(tmp_path / "fit.json", {"fingerprint": files.fingerprint(old), "parts": old})
    with pytest.raises(ValueError, match=r"earlier version; .*migrate_records\.py"):
        stage.check_same(tmp_path / "fit.json", new)


def test_part_files_of_ended_processes_are_swept_and_those_of_living_ones_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = re.sub(r"\W", "_", os.uname().nodename)
    names = [f".x.json.{host}-{pid}-0123abcd.part" for pid in (ended.pid, os.getpid())]
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / "deep" / name).write_bytes(b"half")
        (tmp_path / f".folder{name}").mkdir()
    (tmp_path / ".x.json.elsewhere-1-0123abcd.part").write_bytes(b"of another machine")

    files.sweep(tmp_path)
    left = sorted(path.name for path in tmp_path.rglob("*.part"))
    assert left == sorted([names[1], f".folder{names[1]}", ".x.json.elsewhere-1-0123abcd.part"])

    with files.scratch(tmp_path / "x.so") as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_a_record_is_written_in_lines_and_reads_back(monkeypatch):
    content = {"b": {"z": [1, 2.5, None], "a": "x" * 30}, "a": [[1, "é"], {}, []], "c": "y" * 50}
    for columns in (10, 40, 1000):
        monkeypatch.setattr(files, "JSON_COLUMNS", columns)
        lines = files.json_text(content).split("\n")
        assert json.loads("\n".join(lines)) == content
        assert all(len(line) <= columns + 1 or not set("[{") & set(line) for line in lines)
        keys = [line[2] for line in lines if line.startswith(' "')]
        assert keys == (sorted(content) if columns < 1000 else [])
    assert len(lines) == 1


def test_a_layer_map_is_recorded_by_kinds_without_a_loss():
    rows = [
        {"layer": name, "role": role, "weight": "4 bits", "input": role}
        for name, role in (("a", "conv"), ("b", "first"), ("c", "conv"))
    ]
    found = layer_record(rows)
    assert len(found["kinds"]) == 2
    assert [{"layer": name, **found["kinds"][kind]} for name, kind in found["layers"]] == rows
