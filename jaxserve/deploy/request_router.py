"""`PrefixCacheRouter`: Ray Serve's hook that picks the replica of a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jaxserve.deploy.prefix_index import PrefixIndex, split_hashes
from jaxserve.deploy.running import note_running

NUM_BLOCKS = "num_blocks"  # in a replica's metadata: the size of its KV pool


class PrefixCacheRouter(RequestRouter):
    """Sends a request to the replica with the longest cached prefix, unless another one has much less to do.

    Requests say what they need in keyword arguments: `hashes`, the prompt's block hashes, and `avoid`, the replicas
    that failed them already. Lives in each process that has a handle to the engines; those do not talk to each other.
    """

    def initialize_state(self, max_load_difference: int = 16, **kwargs: Any) -> None:
        """Take the settings; called by Serve before all else."""
        self._max_load_difference = max_load_difference
        self._index = PrefixIndex()
        self._num_under_way: Counter[str] = Counter()  # requests sent from here, by replica

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are; called by Serve."""
        super().update_replicas(replicas)
        note_running(replica.replica_id for replica in replicas)
        self._index.set_replicas(
            {str(replica.replica_id.unique_id): replica.replica_metadata.get(NUM_BLOCKS, 0) for replica in replicas}
        )

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget what a dead replica held; called by Serve."""
        super().on_replica_actor_died(replica_id)
        self._index.forget(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas; of each rank Serve takes the first that has room. Called by Serve."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        options = pending_request.kwargs if pending_request is not None else {}
        hashes = split_hashes(options.get("hashes", b""))
        avoided = [replica for replica in options.get("avoid", ()) if replica in by_id]
        for replica in avoided:
            self._index.forget(replica)
        loads = {name: self._load(replica) for name, replica in by_id.items() if name not in avoided}
        order = self._index.order(hashes, loads, self._max_load_difference)
        if order:
            # Before it has been sent: what comes next, in the same moment, should follow it.
            self._index.insert(order[0], hashes)
        ranked = [by_id[name] for name in (*order, *avoided)]
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in ranked[:2]] + [ranked[2:]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note where a request went; called by Serve when the replica has taken it."""
        name, loop = replica_id.unique_id, asyncio.get_running_loop()
        self._index.insert(name, split_hashes(pending_request.kwargs.get("hashes", b"")))
        self._num_under_way[name] += 1
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(self._note_end, name))

    def _note_end(self, name: str) -> None:
        self._num_under_way[name] -= 1
        self._num_under_way += Counter()  # without those that have none

    def _load(self, replica: RunningReplica) -> int:
        """Serve's count has the requests of other API servers too, but is forgotten after 10 s without news."""
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(known, self._num_under_way[replica.replica_id.unique_id])
