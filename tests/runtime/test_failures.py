"""Why a run failed is in its folder until it succeeds."""

import pytest

from tdq_exp.runtime import failures


def fail(folder, error):
    with pytest.raises(type(error)), failures.noted(folder):
        raise error


def test_an_error_is_noted_until_a_run_succeeds(tmp_path):
    assert failures.failure(tmp_path) is None
    fail(tmp_path, ValueError("fit.lr=nan: diverged\nsecond line"))
    assert failures.failure(tmp_path).startswith("ValueError: fit.lr=nan: diverged (")
    with failures.noted(tmp_path):
        pass
    assert failures.failure(tmp_path) is None and not list(tmp_path.iterdir())


def test_nothing_is_made_for_a_run_that_was_refused_or_kept_out(tmp_path):
    fail(tmp_path / "never", ValueError("no such option"))
    fail(tmp_path, BlockingIOError("in use"))
    fail(tmp_path, KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
