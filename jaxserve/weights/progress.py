"""A progress bar for loading weights: on a terminal only, a log line elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.weights.mapping import OnProgress

_log = logging.getLogger(__name__)


@contextmanager
def loading_progress(title: str = "loading weights") -> Iterator[OnProgress]:
    """Give an `on_progress` for `load_params`; says at the end how much was loaded and how fast."""
    started = time.perf_counter()
    seen = 0

    if not sys.stderr.isatty():

        def count(param: str, loaded_bytes: int, total_bytes: int) -> None:
            nonlocal seen
            seen = loaded_bytes

        yield count
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)

            def show(param: str, loaded_bytes: int, total_bytes: int) -> None:
                nonlocal seen
                seen = loaded_bytes
                bar.update(task, completed=loaded_bytes, total=total_bytes)

            yield show
    elapsed_s = time.perf_counter() - started
    _log.info("%s: %.2f GB in %.1f s", title, seen / 1e9, elapsed_s)
