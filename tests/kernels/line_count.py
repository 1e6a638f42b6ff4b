"""How much Python a call runs: the same on every machine, where a time is not."""

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def lines_run(call: Callable[[], object]) -> int:
    """The lines that Python runs in a second call of `call`; the first fills caches."""
    call()
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    outer, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # hypothesis has a callback in Python at each collection
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(outer)
        if collects:
            gc.enable()
    return count
