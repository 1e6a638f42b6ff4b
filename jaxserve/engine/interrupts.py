"""`held_interrupts`: Ctrl-C waits until an engine in this process is between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold the first SIGINT back until the yielded function is called, or to the end; the next one is not held back.

    It is then given to the handler that was there before, which raises KeyboardInterrupt unless the program has
    another. Nothing is changed in threads that signals do not interrupt, and where no Python code handles SIGINT.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    is_held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal is_held
        is_held = not is_held
        if not is_held:
            handler(number, frame)

    def deliver() -> None:
        nonlocal is_held
        if is_held:
            is_held = False
            handler(signal.SIGINT, None)

    signal.signal(signal.SIGINT, hold)
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, handler)
        deliver()
