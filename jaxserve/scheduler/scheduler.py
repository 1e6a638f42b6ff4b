"""`Scheduler`: decides what each step computes, and turns what the device sampled into deltas."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter

from jaxserve.cache.block_pool import BlockPool, IntegrityError
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.errors import InvalidRequestError, QueueFullError
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.request import EngineRequest, RequestStatus
from jaxserve.scheduler.block_tables import BlockTables
from jaxserve.scheduler.draft_planner import Drafter, DraftPlanner, NoDrafter
from jaxserve.scheduler.plan import NewSlot, RowError, StepPlan, StepResult
from jaxserve.scheduler.prompt_check import check_prompt
from jaxserve.scheduler.scheduled_request import ScheduledRequest
from jaxserve.scheduler.settings import SchedulerSettings, SchedulerStats
from jaxserve.scheduler.waiting_queue import RANKS, WaitingQueue

_by_rank = attrgetter("rank")


class Scheduler:
    """Owns requests, slots and blocks. One thread calls it; every plan it returns must be dispatched, in order.

    # running, in order of rank   | first ............................. last |
    # gets tokens of the step     -->            gives up its blocks first <-- , and never once it is in the plan
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        block_pool: BlockPool,
        prefix_cache: PrefixCache | None,
        drafter: Drafter | None = None,
    ) -> None:
        self._settings = settings
        self._pool = block_pool
        self._prefix_cache = prefix_cache
        self._tables = BlockTables(block_pool, prefix_cache)
        self._drafts = DraftPlanner(settings, self._tables, drafter or NoDrafter())
        self._rank = RANKS[settings.policy]
        # The last token of a sequence needs no K and V, so the pool bears one token more than it has positions.
        self._token_limit = min(settings.max_model_len, block_pool.num_usable * block_pool.block_size + 1)
        self._requests: dict[str, ScheduledRequest] = {}  # unfinished
        self._waiting = WaitingQueue()
        self._running: list[ScheduledRequest] = []  # in order of rank
        self._slots = range(settings.first_slot, settings.first_slot + settings.max_num_seqs)
        self._free_slots = list(reversed(self._slots))  # a stack
        self._rows: dict[int, list[ScheduledRequest]] = {}  # step in flight -> whose row is whose
        self._num_added = 0
        self._num_preemptions = 0
        self._num_steps = 0
        self._num_computed_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def num_steps_in_flight(self) -> int:
        """Plans whose results have not come back."""
        return len(self._rows)

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises `PromptTooLongError`, `QueueFullError`, `InvalidRequestError`."""
        check_prompt(request, self._settings, self._pool)
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        if len(self._waiting) >= self._settings.max_queued_requests:
            raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
        self._num_added += 1
        rank = self._rank(request, self._num_added)
        record = ScheduledRequest.of(request, rank=rank, token_limit=self._token_limit)
        self._requests[request.request_id] = record
        self._waiting.push(record)

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """End requests now; unknown and finished ids are passed over. Returns their last deltas."""
        deltas: list[TokenDelta] = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                deltas.append(request.final_delta(FinishReason.ABORT))
                self._finish(request, FinishReason.ABORT)
        if deltas:
            self._drop_finished()
        return deltas

    def schedule(self) -> StepPlan | None:
        """The next step, or None where nothing can run before the results in flight are known."""
        if self._drafts.are_in_flight:
            return None
        plan = StepPlan(step_id=self._num_steps + 1)
        rows: list[ScheduledRequest] = []
        budget = self._plan_running(plan, rows)
        if self._waiting:
            budget = self._plan_waiting(plan, rows, budget)
        if not rows:
            return None
        self._drafts.extend(plan, rows, budget)
        plan.request_ids = [request.request_id for request in rows]
        plan.slots = [request.slot for request in rows]
        self._num_steps += 1
        self._num_computed_tokens += sum(plan.num_tokens)
        self._rows[plan.step_id] = rows
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in a step's result; plans come back in the order they were made."""
        rows = self._rows.pop(plan.step_id)
        self._drafts.settle(plan, result)
        if result.duration_s is not None:
            self.observe(plan.total_num_tokens, has_drafts=bool(plan.drafts), duration_s=result.duration_s)
        deltas: list[TokenDelta] = []
        logprobs, num_unfinished = result.logprobs, len(self._requests)
        for row, entries in result.prompt_logprobs.items():
            rows[row].collect_prompt_logprobs(plan.starts[row], entries)
        for row, (request, samples, token_ids) in enumerate(zip(rows, plan.samples, result.token_ids, strict=True)):
            request.num_in_flight -= samples
            if token_ids and request.finish_reason is None:
                request.num_computed_tokens += len(token_ids) - 1  # the drafts that held
                delta = request.append(token_ids)
                if logprobs and row in logprobs:
                    delta.logprobs = logprobs[row][: len(token_ids)]
                if delta.finish_reason is not None:
                    self._finish(request, delta.finish_reason)
                deltas.append(delta)
        for row, error in result.errors.items():
            self._fail(rows[row], error, deltas)
        if len(self._requests) != num_unfinished:
            self._drop_finished()
        return deltas

    def observe(self, num_tokens: int, *, has_drafts: bool, duration_s: float) -> None:
        """Take in how long a step took."""
        self._drafts.observe(num_tokens=num_tokens, has_drafts=has_drafts, duration_s=duration_s)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False where there is no prefix cache."""
        if self._prefix_cache is None:
            return False
        self._prefix_cache.reset()
        return True

    def stats(self) -> SchedulerStats:
        """Where the scheduler stands."""
        cache = self._prefix_cache
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=self._pool.usage,
            prefix_queried_tokens=0 if cache is None else cache.num_queried_tokens,
            prefix_hit_tokens=0 if cache is None else cache.num_hit_tokens,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            drafts=self._drafts.counts,
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block, slot and request is accounted for."""
        self._pool.check_integrity(request.block_ids for request in self._requests.values())
        if self._prefix_cache is not None:
            self._prefix_cache.check_integrity()
        slots = sorted(chain(self._free_slots, (request.slot for request in self._running)))
        if slots != list(self._slots):
            raise IntegrityError(f"scheduler: free and used slots are {slots[:8]}.. of {self._settings.max_num_seqs}")
        known = sorted(chain((r.request_id for r in self._running), (r.request_id for r in self._waiting)))
        if known != sorted(self._requests):
            raise IntegrityError(f"scheduler: {len(known)} requests run or wait, {len(self._requests)} are unfinished")

    # Planning

    def _plan_running(self, plan: StepPlan, rows: list[ScheduledRequest]) -> int:
        """Rows for the requests that run, each at least a token; returns what is left of the token budget.

        The loop that every step takes for every request: what a row is stands in place, and not in a method.
        """
        budget = self._settings.max_num_batched_tokens
        running = self._running
        starts, counts, sampled = plan.starts, plan.num_tokens, plan.samples
        for index, request in enumerate(running, 1):  # preemption shortens it from the end
            num_known = len(request.token_ids)
            num_tokens = num_known + request.num_in_flight
            if num_tokens >= request.max_total_tokens:
                continue  # its last token is in flight
            start = request.num_computed_tokens
            num_new = num_tokens - start
            if num_new > 1:
                num_new = min(num_new, self._settings.max_tokens_per_row, budget - (len(running) - index))
            end = start + num_new
            if end > request.num_block_tokens and not self._grow(request, end, plan):
                break
            request.num_computed_tokens = end
            if end == num_tokens:
                request.num_in_flight += 1
            if num_known >= request.num_cacheable_tokens:
                self._tables.publish(request)
            rows.append(request)
            starts.append(start)
            counts.append(num_new)
            sampled.append(end == num_tokens)
            budget -= num_new
        return budget

    def _plan_waiting(self, plan: StepPlan, rows: list[ScheduledRequest], budget: int) -> int:
        """Admit requests in order of rank while slots, tokens and blocks last; returns what is left of `budget`."""
        # A newcomer that takes the last blocks is preempted as soon as a running request needs one: work for nothing.
        num_reserved = sum(1 for r in self._running if r.max_total_tokens - 1 > r.num_block_tokens)
        while budget and self._free_slots and self._waiting:
            request = self._waiting.first()
            if request.num_in_flight or not self._tables.admit(request, num_reserved):
                break
            self._admit(self._waiting.pop(), plan)
            start, num_known = request.num_computed_tokens, len(request.token_ids)
            num_new = min(num_known - start, self._settings.max_tokens_per_row, budget)
            request.num_computed_tokens = end = start + num_new
            request.num_in_flight = int(end == num_known)
            if num_known >= request.num_cacheable_tokens:
                self._tables.publish(request)
            rows.append(request)
            plan.starts.append(start)
            plan.num_tokens.append(num_new)
            plan.samples.append(end == num_known)
            budget -= num_new
            num_reserved += request.max_total_tokens - 1 > request.num_block_tokens
        return budget

    def _admit(self, request: ScheduledRequest, plan: StepPlan) -> None:
        """A request that has its blocks gets a slot and runs."""
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        if request.first_scheduled_time_s is None:
            request.first_scheduled_time_s = time.monotonic()
        insort(self._running, request, key=_by_rank)
        plan.new_slots.append(
            NewSlot(
                slot=request.slot,
                request_id=request.request_id,
                token_ids=request.token_ids.copy(),
                num_prompt_tokens=len(request.prompt_token_ids),
                sampling_params=request.sampling_params,
                stop_token_ids=list(request.stop_tokens),
                block_ids=request.block_ids.copy(),
            )
        )

    def _grow(self, request: ScheduledRequest, num_tokens: int, plan: StepPlan) -> bool:
        """Room for `num_tokens`, preempting from the end; False where the request itself was the last."""
        while (block_ids := self._tables.grow(request, num_tokens)) is None:
            last = self._running.pop()
            self._preempt(last)
            if last is request:
                return False
        plan.new_blocks.append((request.slot, block_ids))
        return True

    def _preempt(self, request: ScheduledRequest) -> None:
        """Take slot and blocks from a request; it waits to be computed again, its tokens kept."""
        self._vacate(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(request)

    def _vacate(self, request: ScheduledRequest) -> None:
        self._tables.release(request)
        self._free_slots.append(request.slot)
        request.slot = 0

    # Results

    def _fail(self, request: ScheduledRequest, error: RowError, deltas: list[TokenDelta]) -> None:
        """End a request whose row went wrong, unless it has ended meanwhile."""
        if error.taints_blocks:
            self._tables.forget(request)
        if request.finish_reason is None:
            deltas.append(request.final_delta(FinishReason.ERROR, error))
            self._finish(request, FinishReason.ERROR)

    def _finish(self, request: ScheduledRequest, reason: FinishReason) -> None:
        """Free what a request holds. The caller drops it from `_running` when it is done with all that end."""
        request.finish_reason = reason
        del self._requests[request.request_id]
        self._drafts.release(request)
        if request.status is RequestStatus.RUNNING:
            self._vacate(request)
        else:
            self._waiting.remove(request)
        request.status = RequestStatus.FINISHED

    def _drop_finished(self) -> None:
        self._running = [request for request in self._running if request.finish_reason is None]
