"""The first signal asks a run to stop, the second stops it."""

from __future__ import annotations

import signal
import threading

import pytest

from zowrap.training.signals import catch_stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_raises(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with catch_stop_signals() as asked:
        assert not asked.stopped
        signal.raise_signal(number)
        assert asked.stopped and asked.name == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="broken"), catch_stop_signals():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with catch_stop_signals() as asked:
            found.append((asked.stopped, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
