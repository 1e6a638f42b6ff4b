"""Ctrl-C waits for the end of a step, in the thread that it would interrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from jaxserve.engine.interrupts import held_interrupts


def press() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler_is_there_again() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_one_waits_until_it_is_asked_for():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as deliver:
        deliver()
        done.append("nothing came")
        press()
        done.append("held back")
        deliver()
        done.append("never")
    assert done == ["nothing came", "held back"]


def test_the_end_delivers_it():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        done.append("all")
    assert done == ["all"]


def test_an_error_does_not_hide_it():
    with pytest.raises(KeyboardInterrupt) as caught, held_interrupts():
        press()
        raise ValueError("an error")
    assert isinstance(caught.value.__context__, ValueError)


def test_the_second_one_does_not_wait_and_is_one_interruption():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        done.append("held back")
        press()
        done.append("never")
    assert done == ["held back"]


def test_a_programs_own_handler_gets_it():
    numbers = []
    before = signal.signal(signal.SIGINT, lambda number, _: numbers.append(number))
    try:
        with held_interrupts() as deliver:
            press()
            assert numbers == []
            deliver()
            assert numbers == [signal.SIGINT]
        assert numbers == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            press()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with held_interrupts() as deliver:
            seen.append(signal.getsignal(signal.SIGINT))
            deliver()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [before]
