"""Joins this process to a group of hosts, after which `jax.devices()` are those of all of them."""

from __future__ import annotations

from pathlib import Path

import jax
from jax._src import distributed  # the process id that JAX's compile cache goes by has no public name


def join_hosts(*, coordinator: str, num_hosts: int, rank: int, timeout_s: float) -> None:
    """Call it before JAX is first used. Rank 0 listens at `coordinator` ("host:port") for the others.

    Raises what JAX raises when not all are there within `timeout_s`. Whoever calls it watches the processes himself:
    JAX's own answer to a lost peer, which is to abort every process after 100 s, is turned off.
    """
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    jax.distributed.initialize(
        coordinator_address=coordinator,
        coordinator_bind_address=coordinator if rank == 0 else None,
        num_processes=num_hosts,
        process_id=rank,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s) + 1,
    )


def own_compile_cache(folder: Path) -> Path:
    """The folder of this process's compiled programs, once the backend is up; `folder` itself on one host.

    JAX lets process 0 alone write its compile cache, as if all hosts shared a disk; the others would compile everything
    at every start. Here each writes a folder of its own, which none shares with another that may write too.
    """
    rank = jax.process_index()
    if rank == 0:
        return folder
    distributed.global_state.process_id = 0  # read by the compile cache alone from here on
    return folder / f"rank-{rank}"
