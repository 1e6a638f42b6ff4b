"""What the router takes for a replica's load, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs the extra 'ray'", exc_type=ImportError)

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from jaxserve.deploy.request_router import PrefixCacheRouter

ENGINES = DeploymentID("Engine", "jaxserve")
REPLICAS: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, ENGINES)) for name in "ab"]


class Answer:
    """A replica's answer, which ends when it is told to."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """As Serve's."""
        self._callbacks.append(callback)

    def end(self) -> None:
        """Tell who asked."""
        for callback in self._callbacks:
            callback(None)


def request() -> PendingRequest:
    metadata = RequestMetadata(request_id="request", internal_request_id="internal")
    return PendingRequest(args=[], kwargs={}, metadata=metadata, future=asyncio.get_running_loop().create_future())


async def first_choices(router: PrefixCacheRouter) -> set[str]:
    """The replicas that requests without a known prefix would be sent to."""
    ranks = [await router.choose_replicas(replicas, request()) for replicas in (REPLICAS, REPLICAS[::-1])]
    return {rank[0][0].replica_id.unique_id for rank in ranks}


async def test_a_replica_is_as_busy_as_before_when_serve_has_heard_nothing_of_it_for_long():
    now_s = [0.0]
    router = PrefixCacheRouter(
        ENGINES, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True, get_curr_time_s=lambda: now_s[0]
    )
    router.initialize_state()
    (free,) = await first_choices(router)  # the same hash decides as long as nobody has anything to do
    busy = next(replica.replica_id for replica in REPLICAS if replica.replica_id.unique_id == free)
    answer: Any = Answer()
    router.on_new_queue_len_info(busy, 1)
    router.on_request_routed(request(), busy, answer)
    assert free not in await first_choices(router)
    now_s[0] = 60.0
    assert free not in await first_choices(router)
    answer.end()
    await asyncio.sleep(0)
    assert await first_choices(router) == {free}
