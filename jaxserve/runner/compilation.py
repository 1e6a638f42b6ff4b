"""Ahead-of-time compilation of every shape, in threads, or from where it is kept; and the guard after ready."""

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
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import platform_of, spans_hosts
from jaxserve.runner.program import Program
from jaxserve.runner.program_store import ProgramStore

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
OnCompiled = Callable[[int, int], None]  # done, in total
CompileJobs = Callable[[Mapping[str, Program]], Mapping[str, Compiled]]

# jax records one of these a program that is compiled, or read from its own cache, outside ahead-of-time calls.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def keep_programs(folder: Path, mesh: Mesh) -> ProgramStore | None:
    """Where the programs of `mesh` are kept between starts, in `folder`, which is made readable by its owner alone.

    On several hosts, GPUs and TPUs JAX keeps them, in its own cache, and they are traced at every start; so it is where
    this process uses that cache already. Call it before the first compile.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"compilation_cache_dir {folder} cannot be made: {error.strerror}") from error
    if spans_hosts(mesh) or platform_of(mesh) != "cpu":  # nobody has seen them kept whole there
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        return None
    if used := jax.config.values["jax_compilation_cache_dir"]:  # a program from there cannot be written a second time
        logger.info("JAX keeps programs in %s, so they are traced at every start", used)
        return None
    return ProgramStore(folder, mesh)


def compile_all(
    jobs: Mapping[Key, Program],
    *,
    store: tuple[ProgramStore, str] | None = None,
    num_threads: int | None = None,
    on_compiled: OnCompiled | None = None,
) -> dict[Key, Compiled]:
    """Read every program from `store`, or trace, lower and compile it; the largest should come first.

    `store` comes with a description of all that the jobs depend on, beside their keys. The first error ends it.
    Compiles that run then cannot be stopped, and are not waited for.
    """
    num_threads = num_threads or os.cpu_count() or 1
    compiled: dict[Key, Compiled] = {}
    num_kept = 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
    try:
        futures = {pool.submit(_compile, key, program, store): key for key, program in jobs.items()}
        for future in as_completed(futures):
            compiled[futures[future]], was_kept = future.result()
            num_kept += was_kept
            if on_compiled is not None:
                on_compiled(len(compiled), len(jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if store is not None:
        logger.info("%d of %d programs were kept from an earlier start", num_kept, len(jobs))
    return compiled


def _compile(key: object, program: Program, store: tuple[ProgramStore, str] | None) -> tuple[Compiled, bool]:
    """The program, and whether it was in the store."""
    if store is None:
        return program.lower().compile(), False
    kept, common = store
    description = f"{key} of {common}"
    if (known := kept.find(description, program)) is not None:
        return known, True
    return kept.compile(description, program), False


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
