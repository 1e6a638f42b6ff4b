"""The waiting queue gives the lowest rank first and forgets those that left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.scheduled_request import ScheduledRequest
from jaxserve.scheduler.waiting_queue import RANKS, WaitingQueue
from tests.scheduler.paged_device import make_request


def ranked(rank: tuple[float, ...]) -> ScheduledRequest:
    return ScheduledRequest.of(make_request(str(rank), [1]), rank=rank, token_limit=10)


@given(
    pushed=st.lists(st.integers(0, 1000), unique=True, max_size=30),
    data=st.data(),
)
def test_requests_come_out_by_rank_without_those_that_left(pushed, data):
    requests = {rank: ranked((rank,)) for rank in pushed}
    queue = WaitingQueue()
    for request in requests.values():
        queue.push(request)
    gone = data.draw(st.lists(st.sampled_from(pushed), unique=True)) if pushed else []
    for rank in gone:
        queue.remove(requests[rank])
    left = sorted(set(pushed) - set(gone))
    assert len(queue) == len(left)
    assert {request.rank[0] for request in queue} == set(left)
    for rank in left:
        assert queue.first() is requests[rank]
        assert queue.pop() is requests[rank]
    assert not queue


def test_a_request_may_come_back():
    queue, request = WaitingQueue(), ranked((1,))
    queue.push(request)
    queue.pop()
    queue.push(request)
    assert queue.pop() is request


def test_ranks_follow_the_policy():
    early = make_request("early", [1], priority=5, arrival_time_s=1.0)
    late = make_request("late", [1], priority=0, arrival_time_s=2.0)
    assert RANKS["fcfs"](early, 1) < RANKS["fcfs"](late, 2)
    assert RANKS["priority"](early, 1) > RANKS["priority"](late, 2)
