"""`StartupDisplay`: says what a starting engine does and how long its parts took, for a terminal or for a log."""

from __future__ import annotations

import logging
import re
import sys
import time

from jaxserve.engine.core_facts import CoreInfo

_log = logging.getLogger("jaxserve")

_COUNTED = re.compile(r"(?P<done>\d+) of (?P<total>\d+)")
_COUNT_INTERVAL_S = 2.0  # between lines such as "compile 3 of 20"


class StartupDisplay:
    """Takes an engine's progress lines. Prints whole lines alone: the engine process may write to the same terminal."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._count_s = self._begin_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start began."""
        return time.monotonic() - self._begin_s

    def show(self, text: str) -> None:
        """Show one progress line; of those that count, only some."""
        if self._is_due(text):
            self._line(text)

    def ready(self, info: CoreInfo) -> None:
        """Show what the parts took, and what there is room for."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in info.startup_s.items())
        self._line(f"engine ready after {self.elapsed_s:.1f} s ({parts})")
        self._line(
            f"context {info.max_model_len} tokens; KV pool {info.num_blocks * info.block_size} tokens "
            f"in {info.num_blocks} blocks of {info.block_size}"
        )

    def serving(self, url: str, names: tuple[str, ...]) -> None:
        """Say where the server answers."""
        self._line(f"serving {', '.join(names)} at {url}")

    def _is_due(self, text: str) -> bool:
        counted = _COUNTED.search(text)
        if counted is None or counted["done"] == counted["total"]:
            return True
        now_s = time.monotonic()
        if now_s - self._count_s < _COUNT_INTERVAL_S:
            return False
        self._count_s = now_s
        return True

    def _line(self, text: str) -> None:
        if not sys.stderr.isatty():
            _log.info("%s", text)
            return
        from rich.console import Console

        console = Console(stderr=True, highlight=True, soft_wrap=True)
        console.print(f"[dim]{self.elapsed_s:6.1f} s[/dim]  ", end="")
        console.print(text, markup=False)
