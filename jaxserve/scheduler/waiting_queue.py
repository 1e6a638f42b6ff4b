"""`WaitingQueue`: requests that wait to be admitted, lowest rank first; the policy is in how ranks are made."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from jaxserve.request import EngineRequest
from jaxserve.scheduler.scheduled_request import Rank, ScheduledRequest
from jaxserve.scheduler.settings import Policy

# The last part is the order of arrival at this scheduler, so a preempted request comes before all that came later.
RANKS: dict[Policy, Callable[[EngineRequest, int], Rank]] = {
    "fcfs": lambda request, number: (number,),
    "priority": lambda request, number: (request.priority, request.arrival_time_s, number),
}


class WaitingQueue:
    """A heap by rank. A request that leaves from the middle is skipped when its turn comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, ScheduledRequest]] = []
        self._left: set[Rank] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._left)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        """In no particular order."""
        return (request for rank, request in self._heap if rank not in self._left)

    def push(self, request: ScheduledRequest) -> None:
        heapq.heappush(self._heap, (request.rank, request))

    def first(self) -> ScheduledRequest:
        """Whose turn it is; the queue is not empty."""
        return self._heap[0][1]

    def pop(self) -> ScheduledRequest:
        request = heapq.heappop(self._heap)[1]
        self._drop_left()
        return request

    def remove(self, request: ScheduledRequest) -> None:
        """A waiting request was aborted or found to be finished."""
        self._left.add(request.rank)
        self._drop_left()

    def _drop_left(self) -> None:
        """Keep whose turn it is at the top, and the left ones from piling up below."""
        if len(self._left) > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[0] not in self._left]
            heapq.heapify(self._heap)
            self._left.clear()
        while self._heap and self._heap[0][0] in self._left:
            self._left.discard(heapq.heappop(self._heap)[0])
