"""Fingerprints and rows."""

from __future__ import annotations

import pytest

from tdq_exp.runtime import environment, files, stage


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
    files.write(file, {"fingerprint": files.fingerprint(parts), "parts": parts})
    assert stage.check_same(file, parts)["parts"]["fit"]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"fit\.lr: 0\.1 -> 0\.2\).*label=NAME"):
        stage.check_same(file, {"fit": {"lr": 0.2, "batch": (1, 2)}})


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "fit.json").write_text('{"fingerprint": ')
    with pytest.raises(ValueError, match=r"fit\.json: damaged"):
        files.read(tmp_path / "fit.json")


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    file = tmp_path / "fit.json"
    files.write(file, {"a": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"fit\.json: can't be written \(No space left on device\); free space"):
        files.write(file, {"a": 2})
    assert files.read(file) == {"a": 1}


def test_the_environment_says_where_a_number_comes_from():
    found = environment.environment()
    assert found["versions"]["torch"]
    assert found["machine"]
    assert environment.peak_memory_gb() > 0.01
