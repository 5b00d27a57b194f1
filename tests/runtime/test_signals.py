"""Signals: where they stop the work, and with which code."""

import os
import signal

import pytest

from tdq_exp.commands import cli
from tdq_exp.runtime import signals
from tdq_exp.runtime.progress import track


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Signals as a terminal hands them over: under nohup or in the background some are ignored."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_command_with_its_code_and_a_line(number, code, capsys):
    before = signal.getsignal(number)
    assert cli.exit_code(send, number) == code
    assert capsys.readouterr().err == (
        f"stopped by {number.name}: to go on, run the same command again\n"
    )
    assert signal.getsignal(number) is before


def test_work_that_holds_signals_back_asks_for_them():
    with signals.handled(), pytest.raises(signals.Stopped) as stopped:
        with signals.deferred():
            send(signal.SIGUSR1)
            assert signals.pending() == signal.SIGUSR1
            signals.check()
        pytest.fail("goes on")
    assert stopped.value.number == signal.SIGUSR1
    assert signals.pending() is None


def test_a_signal_that_a_destructor_swallowed_stops_at_the_next_unit():
    done = 0
    with signals.handled(), pytest.raises(signals.Stopped), track("x", 3, show=False) as advance:
        for _ in range(3):
            if done == 1:
                with pytest.raises(signals.Stopped):
                    send(signal.SIGTERM)
            done += 1
            advance("")
    assert done == 2


def test_the_second_of_two_signals_at_once_is_not_another_one():
    with signals.handled(), signals.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)  # a terminal's, and a launcher's
        signals._received.number = None


def test_ctrl_c_again_stops_at_once(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", -1.0)
    with signals.handled(), pytest.raises(signals.Stopped), signals.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("goes on")


def test_what_is_to_be_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            send(signal.SIGHUP)
            assert signals.pending() is None
    finally:
        signal.signal(signal.SIGHUP, before)
