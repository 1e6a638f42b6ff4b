"""`side_by_side`: two halves of a start in threads, of which the first to fail ends the wait for both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

First = TypeVar("First")
Second = TypeVar("Second")


class GivenUp:
    """Whether the start has failed elsewhere; a half asks now and then."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """The start has failed: nobody wants the other half any more."""
        self._event.set()

    def check(self) -> None:
        """Raise `CancelledError` once the start has failed."""
        if self._event.is_set():
            raise CancelledError


def side_by_side(first: Callable[[GivenUp], First], second: Callable[[GivenUp], Second]) -> tuple[First, Second]:
    """What both return. An error of either, or a signal, comes through at once, while the other half still runs."""
    given_up = GivenUp()
    pool = ThreadPoolExecutor(2, thread_name_prefix="start")
    try:
        one, other = pool.submit(first, given_up), pool.submit(second, given_up)
        halves: list[Future[Any]] = [one, other]
        for half in wait(halves, return_when=FIRST_EXCEPTION).done:
            half.result()
        return one.result(), other.result()
    except BaseException:
        given_up.set()
        raise
    finally:
        pool.shutdown(wait=False)
