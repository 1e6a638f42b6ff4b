"""`Harness`: a scheduler and a `PagedDevice` with steps in flight, checking plans and answers as they pass."""

from __future__ import annotations

from collections import deque

from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from tests.scheduler.drafters import HalfRight
from tests.scheduler.paged_device import PagedDevice, expected_output, make_request


class Harness:
    """`depth` steps are in flight while the next is planned; 0 is a synchronous engine."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        prefix_cache: bool = True,
        depth: int = 1,
        drafts: dict | None = None,  # for `HalfRight`
        **settings,
    ) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "max_queued_requests": 1000}
        self.settings = SchedulerSettings(**(defaults | settings))
        self.pool = BlockPool(num_blocks, block_size)
        self.cache = PrefixCache(self.pool) if prefix_cache else None
        self.device = PagedDevice(num_blocks, block_size)
        self.drafter = HalfRight(self.device.requests, **drafts) if drafts is not None else None
        self.scheduler = Scheduler(self.settings, self.pool, self.cache, self.drafter)
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []
        self.deltas: dict[str, list[TokenDelta]] = {}
        self.token_limit = min(self.settings.max_model_len, self.pool.num_usable * block_size + 1)

    def add(self, request_id: str, prompt: list[int], **fields) -> EngineRequest:
        """Add a request; `fields` as for `make_request`."""
        request = make_request(request_id, prompt, **fields)
        self.scheduler.add(request)
        self.device.requests[request_id] = request
        self.deltas[request_id] = []
        return request

    def step(self) -> StepPlan | None:
        """Plan and dispatch a step, then take in the result that is due."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._check_plan(plan)
            self.plans.append(plan)
            self.in_flight.append((plan, self.device.run(plan)))
        if len(self.in_flight) > (self.depth if plan is not None else 0):
            self.deliver()
        return plan

    def deliver(self) -> list[TokenDelta]:
        """Take in the oldest result."""
        deltas = self.scheduler.update(*self.in_flight.popleft())
        self._record(deltas)
        return deltas

    def abort(self, *request_ids: str) -> list[TokenDelta]:
        deltas = self.scheduler.abort(request_ids)
        self._record(deltas)
        return deltas

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left, then check the books."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished and not self.in_flight:
                break
            had_results = bool(self.in_flight)
            assert self.step() is not None or had_results, "requests are unfinished, and nothing can run"
        assert not self.scheduler.has_unfinished, f"unfinished after {max_steps} steps"
        self.scheduler.check_integrity()
        assert not self.scheduler.stats().num_running
        assert self.pool.num_free == self.pool.num_usable

    def output(self, request_id: str) -> list[int]:
        return [token_id for delta in self.deltas[request_id] for token_id in delta.token_ids]

    def finish_reason(self, request_id: str) -> FinishReason | None:
        return self.deltas[request_id][-1].finish_reason if self.deltas[request_id] else None

    def check_answer(self, request_id: str) -> None:
        """A request's answer is what it would be alone, up to where it was aborted or failed."""
        request, deltas = self.device.requests[request_id], self.deltas[request_id]
        tokens, reason, stop_token_id = expected_output(request, self.token_limit)
        output, last = self.output(request_id), deltas[-1]
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        if last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert output == tokens[: len(output)]
        else:
            assert (output, last.finish_reason, last.stop_token_id) == (tokens, reason, stop_token_id)
        assert [delta.num_cached_tokens is None for delta in deltas[1:]] == [True] * (len(deltas) - 1)
        if request.sampling_params.prompt_logprobs is not None and output:
            entries = deltas[0].prompt_logprobs
            assert entries is not None and entries[0] is None
            assert [entry.token_id for entry in entries[1:] if entry] == request.prompt_token_ids[1:]

    def _check_plan(self, plan: StepPlan) -> None:
        assert 1 <= plan.num_rows <= self.settings.max_num_seqs
        assert plan.total_num_tokens <= self.settings.max_num_batched_tokens
        assert min(plan.num_tokens) >= 1
        assert max(plan.num_tokens) <= self.settings.max_tokens_per_row
        num_drafts = sum(map(len, plan.drafts.values()))
        assert num_drafts <= self.settings.max_num_drafts
        assert sum(plan.samples) + num_drafts <= self.settings.max_num_samples
        assert not any(other.drafts for other, _ in self.in_flight), "a row's start is not known yet"
        assert len(set(plan.slots)) == len(plan.slots)
        assert len(set(plan.request_ids)) == len(plan.request_ids)
        for request_id, start, num_tokens in zip(plan.request_ids, plan.starts, plan.num_tokens, strict=True):
            request = self.device.requests[request_id]
            limit = len(request.prompt_token_ids) + (request.sampling_params.max_tokens or self.token_limit)
            assert start + num_tokens < min(limit, self.token_limit), f"{request_id} is computed beyond its end"
        assert set(plan.slots) <= set(range(1, self.settings.max_num_seqs + 1))

    def _record(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert self.finish_reason(delta.request_id) is None, "a finished request goes on"
            self.deltas[delta.request_id].append(delta)
