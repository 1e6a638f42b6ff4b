"""`running_replicas`: the engines' replicas that Serve has told this process's router of.

Serve makes the router and gives it to nobody, so that what it knows has to be kept beside it; and not in its module,
of which Serve sends every process a copy.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray.serve.request_router import ReplicaID

_replicas: tuple[ReplicaID, ...] = ()


def note_running(replicas: Iterable[ReplicaID]) -> None:
    """Take over which replicas there are; called by the router."""
    global _replicas
    _replicas = tuple(replicas)


def running_replicas() -> tuple[ReplicaID, ...]:
    """Return them; none before the first call through a handle to the engines."""
    return _replicas
