"""`HostSession`: what an engine process must know to find those of the other hosts."""

from __future__ import annotations

import msgspec


class HostSession(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a group of engine processes, one a host: from its start to its end or its first failure."""

    session_id: int
    rank: int
    num_hosts: int
    coordinator: str  # host:port of JAX's coordination service, in rank 0's engine process
    plans: str  # host:port where rank 0's engine process hands out plans
    timeout_s: float  # how long to wait for the others
