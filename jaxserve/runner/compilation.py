"""Ahead-of-time compilation of every shape, in threads, with the persistent cache; and the guard after ready."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
from jax import monitoring
from jax.stages import Compiled, Lowered

from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
OnCompiled = Callable[[int, int], None]  # done, in total
CompileJobs = Callable[[Mapping[str, Callable[[], Lowered]]], Mapping[str, Compiled]]

# jax records one of these a program that is compiled, or read from the persistent cache, outside ahead-of-time calls.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, whatever they took to compile. Set once, before the first compile.

    A cache holds code that will run: the folder is made readable by its owner alone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"compilation_cache_dir {folder} cannot be made: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_all(
    jobs: Mapping[Key, Callable[[], Lowered]],
    *,
    num_threads: int | None = None,
    on_compiled: OnCompiled | None = None,
) -> dict[Key, Compiled]:
    """Trace, lower and compile every job; the largest should come first.

    The first error ends it. Compiles that run then cannot be stopped, and are not waited for.
    """
    num_threads = num_threads or os.cpu_count() or 1
    compiled: dict[Key, Compiled] = {}
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
    try:
        futures = {pool.submit(_compile, lower): key for key, lower in jobs.items()}
        for future in as_completed(futures):
            compiled[futures[future]] = future.result()
            if on_compiled is not None:
                on_compiled(len(compiled), len(jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return compiled


def _compile(lower: Callable[[], Lowered]) -> Compiled:
    return lower().compile()


class CompileGuard:
    """Counts compiles in an engine's steps: each is a shape that warm-up forgot, and stalls every request meanwhile.

    JAX tells of every compile in the process, in the thread that waits for it: those of another engine, or of the
    user's own programs, do not count.
    """

    def __init__(self) -> None:
        self.num_compiles = 0
        self._is_armed = False
        self._watched_thread: int | None = None

    def arm(self) -> None:
        """The engine is ready: count from now on."""
        if not self._is_armed:
            monitoring.register_event_duration_secs_listener(self._on_event)
            self._is_armed = True

    def disarm(self) -> None:
        """The engine shuts down. May be called twice."""
        if self._is_armed:
            monitoring.unregister_event_duration_listener(self._on_event)
            self._is_armed = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """What this thread compiles inside is a step's."""
        self._watched_thread = threading.get_ident()
        try:
            yield
        finally:
            self._watched_thread = None

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT and threading.get_ident() == self._watched_thread:
            self.num_compiles += 1
            logger.error(
                "compiled a program after ready (%.2f s, %s): a shape is missing in the warm-up", duration_secs, kwargs
            )
