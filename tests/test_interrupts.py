"""Signals that end a command."""

import os
import signal

import pytest

from derain import cli
from derain.errors import Stopped
from derain.interrupts import SIGNALS, interruptible


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_the_block(number, code, handlers):
    with pytest.raises(Stopped) as stopped, interruptible():
        signal.raise_signal(number)
    assert stopped.value.code == code
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    """``nohup`` ignores SIGHUP, and shells ignore SIGINT for commands in the background."""
    signal.signal(number, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_does_not_end_the_clean_up(first, second):
    steps = []

    def command():
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)
            steps.append("removed")

    with pytest.raises(Stopped) as stopped, interruptible():
        command()
    assert steps == ["removed"]
    assert stopped.value.code == 128 + first


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("stopped here", signal.SIGTERM), 143, "stopped here"),
    ],
)
def test_the_command_line_prints_one_line_and_returns_the_code(raised, code, message, monkeypatch, capsys):
    from derain.commands import train

    def stopped(arguments):
        raise raised

    monkeypatch.setattr(train, "run", stopped)
    assert cli.main(["fit"]) == code
    assert capsys.readouterr().err == f"derain: {message}\n"
