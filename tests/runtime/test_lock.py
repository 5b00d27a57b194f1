"""Locks on folders: who may enter, what a killed holder leaves, and what other machines leave."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tdq_exp.runtime import lock


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "name" / "seed0"


def left_behind(folder, machine, pid, age=0.0):
    """Write what a holder that did not end by itself leaves."""
    folder.mkdir(parents=True)
    file = folder / lock.NAME
    file.write_text(json.dumps({"host": "node7", "machine": machine, "pid": pid, "since": "noon"}))
    os.utime(file, (time.time() - age,) * 2)


def dead_pid():
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_the_second_is_told_who_holds_the_folder_and_since_when(folder):
    with lock.held(folder):
        with pytest.raises(lock.InUse) as refused, lock.held(folder, "take another"):
            pytest.fail("two holders")
        told = str(refused.value)
        assert str(folder) in told and f"process {os.getpid()} on " in told
        assert time.strftime("since %Y-") in told and told.endswith("; take another")
        assert folder.exists()


def test_nothing_is_left_where_nothing_was_written(folder, tmp_path):
    with pytest.raises(RuntimeError), lock.held(folder):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

    with lock.held(folder):
        (folder / "fit.json").write_text("{}")
    assert [file.name for file in folder.iterdir()] == ["fit.json"]


def test_a_killed_holder_keeps_nobody_out(folder):
    hold = (
        "import sys, time, pathlib\nfrom tdq_exp.runtime import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])): print('held', flush=True), time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(lock.InUse, match=f"process {holder.pid} on"), lock.held(folder):
            pytest.fail("two holders")
        holder.send_signal(signal.SIGKILL)

    assert (folder / lock.NAME).exists()
    with lock.held(folder):
        assert json.loads((folder / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("age", "alive"), [(0, True), (2 * lock.SILENCE, False)])
def test_a_holder_on_another_machine_is_alive_as_long_as_it_shows_it(folder, age, alive):
    left_behind(folder, "another", os.getpid(), age)
    refusal = pytest.raises(lock.InUse, match="on node7 since noon")
    with refusal if alive else contextlib.nullcontext(), lock.held(folder):
        assert not alive


@pytest.mark.parametrize("alive", [True, False])
def test_without_flock_the_process_itself_is_looked_for(folder, alive, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    left_behind(folder, lock._machine(), os.getpid() if alive else dead_pid())
    with pytest.raises(lock.InUse) if alive else contextlib.nullcontext(), lock.held(folder):
        assert not alive


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_again(folder, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(file, operation):
        if not calls:
            (folder / lock.NAME).unlink()
        calls.append(file)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(folder):
        assert len(calls) == 2 and (folder / lock.NAME).exists()


def test_a_finished_run_that_cannot_be_written_needs_no_lock(folder, monkeypatch):
    folder.mkdir(parents=True)

    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with lock.held(folder):
        pass


def test_who_makes_the_same_cache_waits_for_the_first(folder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "POLL", 0.01)
    order = []

    def second():
        with lock.waited_for(folder, "a set"):
            order.append("second")

    with lock.held(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()

    assert order == ["first", "second"]
    assert capsys.readouterr().out.count("waiting for a set") == 1
