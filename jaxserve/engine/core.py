"""`EngineCore`: plans a step, dispatches it, and collects the one before; the loop that everything else serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.cache.block_pool import IntegrityError
from jaxserve.config import Config
from jaxserve.engine.assembly import OnProgress
from jaxserve.engine.compiling import CompilingRequests
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.engine.hosts.plans import LeadingHosts
from jaxserve.engine.startup import Started, start
from jaxserve.errors import EngineDeadError
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import Runner
from jaxserve.runner.pending import PendingStep
from jaxserve.scheduler.data_parallel import DataParallelScheduler
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.scheduler import Scheduler

COMPILING_POLL_S = 0.02  # how long to wait for a grammar when there is nothing else to do


class EngineCore:
    """Owns the scheduler and the runner of one model. Not thread-safe: one thread calls everything.

    # device   |--- step 1 ---|--- step 2 ---|--- step 3 ---|
    # host     plan 2, dispatch 2, result 1, update | plan 3, dispatch 3, result 2, update | ...

    Nothing is planned while drafts are in flight: then step 2 is planned as soon as step 1's result is taken in.
    """

    def __init__(
        self,
        config: Config,
        *,
        on_progress: OnProgress | None = None,
        started: Started | None = None,
        hosts: LeadingHosts | None = None,
    ) -> None:
        """Load and compile (or take what `started` brings): ready afterwards. On several hosts, `hosts` must lead."""
        started = started or start(config, on_progress or (lambda line: None), hosts)
        self.info: CoreInfo = started.info
        self._scheduler: Scheduler | DataParallelScheduler = started.scheduler
        self._runner: Runner = started.runner
        self._grammars = started.grammars
        self._compiling = CompilingRequests(started.grammars, max_requests=config.scheduler.max_queued_requests)
        self._guard = started.guard
        self._depth = 1 if config.scheduler.async_scheduling else 0  # steps that may stay in flight
        self._in_flight: list[tuple[StepPlan, PendingStep, float]] = []  # with the time its planning began
        self._last_result_s = 0.0  # time.perf_counter() of the last result
        self._fault: str | None = None  # what broke the core
        self._hosts = hosts

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        is_idle = not (self._in_flight or self._compiling or self._scheduler.has_unfinished)
        return self._fault is None and not is_idle

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request; raises `QueueFullError`, `PromptTooLongError`, or `EngineDeadError` after a failed step."""
        self._check_whole()
        if not self._compiling.hold(request):
            self._scheduler.add(request)

    def abort(self, request_ids: list[str]) -> list[TokenDelta]:
        """End requests now; their blocks are free for the next plan. After a failed step there is nothing to end."""
        if self._fault is not None:
            return []
        return [*self._compiling.abort(request_ids), *self._scheduler.abort(request_ids)]

    def step(self) -> list[TokenDelta]:
        """Dispatch the next plan, then collect the step before it; empty while the pipeline fills.

        An error on the way leaves blocks that were promised and not written, and buffers that are gone: it passes
        through, and every later call raises `EngineDeadError`. Ctrl-C is such an error, except while a result is waited
        for; whoever wants to go on after it holds it back (`held_interrupts`).
        """
        self._check_whole()
        refused = self._compiling.release(self._scheduler.add)
        with self._guard.watch():
            with self._breaks_on(BaseException):
                is_dispatched = self._dispatch_next()
                if not self._in_flight and self._scheduler.has_unfinished:
                    raise IntegrityError("requests wait, nothing runs, and none of them can be scheduled")
            if not self._in_flight:
                self._compiling.wait(COMPILING_POLL_S)
                return refused
            if is_dispatched and len(self._in_flight) <= self._depth:
                return refused
            with self._breaks_on(Exception):
                result = self._in_flight[0][1].result()
            with self._breaks_on(BaseException):
                done, _, begin_s = self._in_flight.pop(0)
                begin_s, self._last_result_s = max(begin_s, self._last_result_s), time.perf_counter()
                result.duration_s = self._last_result_s - begin_s
                deltas = self._scheduler.update(done, result)
                if not self.has_unfinished:
                    self._scheduler.check_integrity()  # idle from here on: the check delays nobody
                elif not self._in_flight and self._depth:
                    self._dispatch_next()  # behind drafts: the device goes on while somebody reads their tokens
        return [*refused, *deltas]

    def stats(self) -> EngineStats:
        """Gauges of this moment and counters since the start."""
        now = self._scheduler.stats()
        return EngineStats(
            num_running=now.num_running,
            num_waiting=now.num_waiting + len(self._compiling),
            kv_cache_usage=now.kv_cache_usage,
            prefix_queried_tokens=now.prefix_queried_tokens,
            prefix_hit_tokens=now.prefix_hit_tokens,
            num_preemptions=now.num_preemptions,
            num_steps=now.num_steps,
            num_computed_tokens=now.num_computed_tokens,
            drafts=now.drafts,
            num_compiles_after_ready=self._guard.num_compiles,
        )

    def reset_prefix_cache(self) -> bool:
        """Let no new request find the cached blocks; False without a prefix cache."""
        self._check_whole()
        return self._scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        """Wait for what is in flight; no step may follow."""
        self._guard.disarm()
        self._grammars.close()
        in_flight, self._in_flight = self._in_flight, []
        if self._fault is None:
            for _, pending, _ in in_flight:
                pending.result()
            if self._hosts is not None:
                self._hosts.end()

    def _dispatch_next(self) -> bool:
        """Plan a step and hand it to the device; False where nothing can be planned now."""
        begin_s = time.perf_counter()
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        self._in_flight.append((plan, self._runner.dispatch(plan), begin_s))
        return True

    def _check_whole(self) -> None:
        if self._fault is not None:
            raise EngineDeadError(f"the engine broke down in an earlier step ({self._fault}); start a new one")

    @contextmanager
    def _breaks_on(self, kind: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except kind as error:
            self._fault = f"{type(error).__name__}: {error}"
            raise
