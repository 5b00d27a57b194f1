"""Fingerprints and rows."""

from __future__ import annotations

import pytest

from tdq_exp import record


def test_a_fingerprint_depends_on_values_and_not_on_their_order():
    assert record.fingerprint({"a": 1, "b": [1, 2]}) == record.fingerprint({"b": [1, 2], "a": 1})
    assert record.fingerprint({"a": 1}) != record.fingerprint({"a": 2})
    assert record.fingerprint({"a": 1}) != record.fingerprint({"a": "1"})


def test_differences_name_the_leaves():
    old, new = {"fit": {"lr": 1, "x": 2}, "gone": 1}, {"fit": {"lr": 3, "x": 2}, "new": 1}
    assert record.differences(old, new) == ["fit.lr: 1 -> 3", "gone: 1 -> None", "new: None -> 1"]


def test_the_same_parts_are_found_and_others_are_refused(tmp_path):
    file, parts = tmp_path / "run" / "fit.json", {"fit": {"lr": 0.1, "batch": (1, 2)}}
    assert record.check_same(file, parts) is None
    record.write(file, {"fingerprint": record.fingerprint(parts), "parts": parts})
    assert record.check_same(file, parts)["parts"]["fit"]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"fit\.lr: 0\.1 -> 0\.2\).*label=NAME"):
        record.check_same(file, {"fit": {"lr": 0.2, "batch": (1, 2)}})


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "fit.json").write_text('{"fingerprint": ')
    with pytest.raises(ValueError, match=r"fit\.json: damaged"):
        record.read(tmp_path / "fit.json")


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    file = tmp_path / "fit.json"
    record.write(file, {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "replace", full)
    with pytest.raises(OSError, match=r"fit\.json: can't be written \(No space left on device\); free space"):
        record.write(file, {"a": 2})
    assert record.read(file) == {"a": 1}


def test_the_environment_says_where_a_number_comes_from():
    found = record.environment()
    assert found["versions"]["torch"]
    assert found["machine"]
    assert record.peak_memory_gb() > 0.01
