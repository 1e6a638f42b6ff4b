"""Two halves of a start: the first failure ends the wait, and tells the other half."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import CancelledError

import pytest

from jaxserve.engine.side_by_side import GivenUp, side_by_side

AGES_S = 20.0


def until_given_up(given_up: GivenUp, told: threading.Event) -> None:
    deadline_s = time.monotonic() + AGES_S
    while time.monotonic() < deadline_s:
        try:
            given_up.check()
        except CancelledError:
            told.set()
            raise
        time.sleep(0.01)


def fail(given_up: GivenUp) -> None:
    raise ValueError("torn")


def test_both_halves_return() -> None:
    assert side_by_side(lambda _: 1, lambda _: "two") == (1, "two")


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_failure_comes_through_and_the_other_half_is_told(is_first: bool) -> None:
    told = threading.Event()
    halves = [fail, lambda given_up: until_given_up(given_up, told)]
    begin_s = time.monotonic()
    with pytest.raises(ValueError, match="torn"):
        side_by_side(*(halves if is_first else reversed(halves)))
    assert time.monotonic() - begin_s < AGES_S / 4
    assert told.wait(AGES_S / 4)


def test_ctrl_c_comes_through() -> None:
    told = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(given_up: GivenUp) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        until_given_up(given_up, told)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(interrupt, lambda _: None)
    assert told.wait(AGES_S / 4)
