"""`DataParallelScheduler`: the schedulers of several data shards behind the interface of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from jaxserve.errors import InvalidRequestError, QueueFullError
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import DraftCounts, SchedulerStats

T = TypeVar("T")


class DataParallelScheduler:
    """Gives each request to the shard that has the fewest, and makes one plan of the shards' plans.

    Each shard's scheduler owns slots (numbered apart), blocks and a prefix cache; a request stays where it was put.

    # plan's rows   | rows of shard 0 | rows of shard 2 | ...      a shard with nothing to do has none
    """

    def __init__(self, shards: Sequence[Scheduler], *, max_queued_requests: int) -> None:
        self._shards = list(shards)
        self._max_queued_requests = max_queued_requests  # of all shards together
        self._shard_of: dict[str, Scheduler] = {}  # unfinished request -> whose it is
        self._num_unfinished = dict.fromkeys(self._shards, 0)
        self._parts: dict[int, list[tuple[Scheduler, StepPlan]]] = {}  # step in flight -> whose rows it has, in order
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return any(shard.has_unfinished for shard in self._shards)

    @property
    def num_steps_in_flight(self) -> int:
        """Plans whose results have not come back."""
        return len(self._parts)

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises `PromptTooLongError`, `QueueFullError`, `InvalidRequestError`."""
        if request.request_id in self._shard_of:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        num_waiting = self.stats().num_waiting
        if num_waiting >= self._max_queued_requests:
            raise QueueFullError(f"{num_waiting} requests wait already; try again later")
        shard = min(self._shards, key=self._num_unfinished.__getitem__)
        shard.add(request)
        self._shard_of[request.request_id] = shard
        self._num_unfinished[shard] += 1

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """End requests now; unknown and finished ids are passed over. Returns their last deltas."""
        known = [request_id for request_id in request_ids if request_id in self._shard_of]
        deltas = [delta for request_id in known for delta in self._shard_of[request_id].abort([request_id])]
        self._forget_finished(deltas)
        return deltas

    def schedule(self) -> StepPlan | None:
        """The next step of all shards, or None where none of them can run, or one of them waits for its drafts."""
        if any(plan.drafts for parts in self._parts.values() for _, plan in parts):
            return None  # the others wait with it: shards that took turns would each use every other step
        parts = [(shard, plan) for shard in self._shards if (plan := shard.schedule()) is not None]
        if not parts:
            return None
        self._num_steps += 1
        self._parts[self._num_steps] = parts
        merged = StepPlan(step_id=self._num_steps)
        for _, plan in parts:
            first = merged.num_rows
            merged.drafts |= {first + row: draft_ids for row, draft_ids in plan.drafts.items()}
            merged.new_slots += plan.new_slots
            merged.new_blocks += plan.new_blocks
            merged.request_ids += plan.request_ids
            merged.slots += plan.slots
            merged.starts += plan.starts
            merged.num_tokens += plan.num_tokens
            merged.samples += plan.samples
        return merged

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in a step's result; plans come back in the order they were made."""
        deltas: list[TokenDelta] = []
        first = 0
        parts = self._parts.pop(plan.step_id)
        if result.duration_s is not None:
            # All shards' batches are padded to the size of the largest, and wait for each other.
            num_tokens = max(part.total_num_tokens for _, part in parts)
            for shard in self._shards:
                shard.observe(num_tokens, has_drafts=bool(plan.drafts), duration_s=result.duration_s)
        for shard, part in parts:
            rows = range(first, first + part.num_rows)
            deltas += shard.update(part, _rows_of(result, rows, step_id=part.step_id))
            first = rows.stop
        self._forget_finished(deltas)
        return deltas

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False where there is no prefix cache."""
        done = [shard.reset_prefix_cache() for shard in self._shards]
        return all(done)

    def stats(self) -> SchedulerStats:
        """Where the shards stand together; the steps are those of all."""
        stats = [shard.stats() for shard in self._shards]
        return SchedulerStats(
            num_running=sum(s.num_running for s in stats),
            num_waiting=sum(s.num_waiting for s in stats),
            kv_cache_usage=sum(s.kv_cache_usage for s in stats) / len(stats),  # the pools are of one size
            prefix_queried_tokens=sum(s.prefix_queried_tokens for s in stats),
            prefix_hit_tokens=sum(s.prefix_hit_tokens for s in stats),
            num_preemptions=sum(s.num_preemptions for s in stats),
            num_steps=self._num_steps,
            num_computed_tokens=sum(s.num_computed_tokens for s in stats),
            drafts=DraftCounts.total([s.drafts for s in stats]),
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block, slot and request is accounted for."""
        for shard in self._shards:
            shard.check_integrity()

    def _forget_finished(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None:
                self._num_unfinished[self._shard_of.pop(delta.request_id)] -= 1


def _rows_of(result: StepResult, rows: range, *, step_id: int) -> StepResult:
    """Some neighbouring rows of a result, counted from 0; the time is not theirs alone."""
    return StepResult(
        step_id=step_id,
        token_ids=result.token_ids[rows.start : rows.stop],
        logprobs=_entries_of(result.logprobs, rows),
        prompt_logprobs=_entries_of(result.prompt_logprobs, rows),
        errors=_entries_of(result.errors, rows),
    )


def _entries_of(by_row: Mapping[int, T], rows: range) -> dict[int, T]:
    return {row - rows.start: value for row, value in by_row.items() if row in rows}
