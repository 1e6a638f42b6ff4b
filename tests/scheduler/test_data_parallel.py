"""Several data shards as one scheduler: who gets a request, and whose rows a result is for."""

from __future__ import annotations

import pytest

from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.errors import InvalidRequestError, QueueFullError
from jaxserve.outputs import FinishReason
from jaxserve.scheduler.data_parallel import DataParallelScheduler
from jaxserve.scheduler.draft_planner import Drafter, NoDrafter
from jaxserve.scheduler.plan import RowError, StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from tests.scheduler.paged_device import make_request

SLOTS = 4  # of a shard, padding included


def scheduler_of(num_shards: int, drafter: Drafter | None = None, **settings) -> DataParallelScheduler:
    shards = []
    for shard in range(num_shards):
        pool = BlockPool(16, 4)
        defaults = {"max_num_seqs": SLOTS - 1, "max_num_batched_tokens": 32, "max_model_len": 40}
        limits = SchedulerSettings(**(defaults | settings), max_queued_requests=100, first_slot=shard * SLOTS + 1)
        shards.append(Scheduler(limits, pool, PrefixCache(pool), drafter))
    return DataParallelScheduler(shards, max_queued_requests=4)


def result_of(plan: StepPlan, **fields) -> StepResult:
    """Every row that samples gets the token 100 + its slot."""
    token_ids = [[100 + slot] if samples else [] for slot, samples in zip(plan.slots, plan.samples, strict=True)]
    return StepResult(step_id=plan.step_id, token_ids=token_ids, **fields)


def add(scheduler: DataParallelScheduler, *names: str, max_tokens: int = 3) -> None:
    for name in names:
        scheduler.add(make_request(name, [ord(name[0]), 5, 6], max_tokens=max_tokens))


def test_requests_go_where_there_are_fewest():
    scheduler = scheduler_of(2)
    add(scheduler, "a", "b", "c", "d")
    plan = scheduler.schedule()
    assert plan.request_ids == ["a", "c", "b", "d"]
    assert plan.slots == [1, 2, SLOTS + 1, SLOTS + 2]
    assert [new.slot for new in plan.new_slots] == plan.slots
    assert plan.new_slots[0].block_ids == plan.new_slots[2].block_ids  # each shard numbers its own blocks


def test_each_shard_takes_in_its_own_rows_of_a_result():
    scheduler = scheduler_of(3)
    add(scheduler, "a", "b", "c", "d")
    plan = scheduler.schedule()
    error = RowError("broken", taints_blocks=False)
    row = plan.request_ids.index("b")
    deltas = {d.request_id: d for d in scheduler.update(plan, result_of(plan, errors={row: error}))}
    assert {name: delta.token_ids for name, delta in deltas.items()} == {"a": [101], "b": [], "c": [109], "d": [102]}
    assert deltas["b"].finish_reason is FinishReason.ERROR
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        scheduler.update(plan, result_of(plan))
    scheduler.check_integrity()
    assert scheduler.stats().kv_cache_usage == 0


def test_steps_in_flight_come_back_to_their_shards():
    scheduler = scheduler_of(2)
    add(scheduler, "a", "b", max_tokens=4)
    plans = [scheduler.schedule(), scheduler.schedule()]
    add(scheduler, "c", max_tokens=1)
    plans.append(scheduler.schedule())
    assert scheduler.num_steps_in_flight == 3
    given: dict[str, list[int]] = {}
    for plan in plans:
        for delta in scheduler.update(plan, result_of(plan)):
            given.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert given == {"a": [101] * 3, "b": [105] * 3, "c": [102]}


class OneGuess(NoDrafter):
    """Guesses that each row goes on with the token 7."""

    def draft(self, rooms, *, num_tokens, max_drafts):
        return {index: [7] for index, room in enumerate(rooms) if room.max_drafts}


def test_drafts_are_named_by_row_of_the_whole_plan_and_all_shards_wait_for_them():
    scheduler = scheduler_of(2, OneGuess(), max_num_drafts=4)
    add(scheduler, "a", "b", max_tokens=4)
    plan = scheduler.schedule()
    assert plan.drafts == {0: [7], 1: [7]}
    add(scheduler, "c")
    assert scheduler.schedule() is None
    result = StepResult(step_id=plan.step_id, duration_s=0.1, token_ids=[[7, 8], [9]])
    assert [delta.token_ids for delta in scheduler.update(plan, result)] == [[7, 8], [9]]
    counts = scheduler.stats().drafts
    assert (counts.num_draft_tokens, counts.num_accepted_tokens, counts.accepted_per_position) == (2, 1, (1,))
    assert scheduler.schedule().request_ids == ["a", "c", "b"]


class Timed(NoDrafter):
    """Guesses for one request alone, and keeps what it is told of times."""

    def __init__(self) -> None:
        self.times: list[tuple[int, bool, float]] = []

    def draft(self, rooms, *, num_tokens, max_drafts):
        return {index: [7] for index, room in enumerate(rooms) if room.request_id == "a"}

    def observe(self, *, num_tokens, has_drafts, duration_s):
        self.times.append((num_tokens, has_drafts, duration_s))


def test_a_step_s_time_is_booked_under_the_largest_shard_s_size_and_anybody_s_drafts_in_all_shards():
    drafter = Timed()  # of all three shards
    scheduler = scheduler_of(3, drafter, max_num_drafts=4)
    add(scheduler, "a", "b")
    plan = scheduler.schedule()
    assert plan.num_tokens == [4, 3]
    scheduler.update(plan, StepResult(step_id=plan.step_id, duration_s=0.5, token_ids=[[7, 8], [9]]))
    assert drafter.times == [(4, True, 0.5)] * 3


def test_an_idle_shard_has_no_rows_and_an_aborted_request_leaves_none():
    scheduler = scheduler_of(2)
    add(scheduler, "a", "b")
    assert [delta.finish_reason for delta in scheduler.abort(["b", "nobody"])] == [FinishReason.ABORT]
    plan = scheduler.schedule()
    assert plan.request_ids == ["a"]
    assert [delta.token_ids for delta in scheduler.update(plan, result_of(plan))] == [[101]]
    scheduler.abort(["a"])
    assert scheduler.schedule() is None
    scheduler.check_integrity()


def test_the_queue_s_limit_and_ids_are_those_of_all_shards():
    scheduler = scheduler_of(2)
    add(scheduler, "a", "b", "c", "d")
    with pytest.raises(InvalidRequestError, match="'b' is in use"):
        add(scheduler, "b")
    with pytest.raises(QueueFullError, match="4 requests wait"):
        add(scheduler, "e")
    assert scheduler.stats().num_waiting == 4


def test_every_shard_shares_prefixes_among_its_own():
    scheduler = scheduler_of(2)
    for name in "abcd":
        scheduler.add(make_request(name, [1, 2, 3, 4, 5], max_tokens=2))
    scheduler.schedule()
    assert scheduler.stats().prefix_hit_tokens == 2 * 4
    assert scheduler.reset_prefix_cache()
