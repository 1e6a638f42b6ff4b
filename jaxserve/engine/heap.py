"""`freeze_heap`: what a process has built by the time it serves is no longer searched for garbage."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Call once, when a process of a server is ready.

    Modules, programs and tokenizers live until the end. A full collection looks through all of them and finds nothing:
    some 90 ms (2 CPU cores, Zen 5) in which no request gets a token, every few hundred steps of 256 requests.
    """
    gc.collect()
    gc.freeze()
