"""A step that fails leaves no engine that looks whole."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.config import load_config
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.interrupts import held_interrupts
from jaxserve.engine.startup import Started
from jaxserve.errors import EngineDeadError
from jaxserve.request import EngineRequest
from jaxserve.runner.compilation import CompileGuard
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from tests.harness import greedy, run, tokens


@dataclass
class Step:
    plan: StepPlan
    runner: FailingRunner

    def is_ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        self.runner.fail_in("result")
        return StepResult(step_id=self.plan.step_id, token_ids=[[7]] * self.plan.num_rows)


class FailingRunner:
    """Says 7 for ever, until it is told where to fail."""

    def __init__(self) -> None:
        self.failures: dict[str, BaseException | signal.Signals] = {}

    def dispatch(self, plan: StepPlan) -> Step:
        self.fail_in("dispatch")
        return Step(plan, self)

    def fail_in(self, place: str) -> None:
        failure = self.failures.pop(place, None)
        if isinstance(failure, signal.Signals):
            signal.raise_signal(failure)
        elif failure is not None:
            raise failure


@pytest.fixture
def runner() -> FailingRunner:
    return FailingRunner()


@pytest.fixture
def core(runner: FailingRunner) -> EngineCore:
    pool = BlockPool(64, 4)
    settings = SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, max_queued_requests=9)
    info = CoreInfo(max_model_len=64, vocab_size=100, num_blocks=64, block_size=4, fingerprint="f")
    scheduler = Scheduler(settings, pool, PrefixCache(pool))
    started = Started(info=info, scheduler=scheduler, runner=runner, guard=CompileGuard())
    return EngineCore(load_config(None, {"model": "m"}, environ={}), started=started)


def fail(core: EngineCore, runner: FailingRunner, place: str, error: BaseException) -> None:
    core.add_request(EngineRequest(request_id="x", prompt_token_ids=[1] * 9, sampling_params=greedy(20)))
    core.step()
    core.step()
    runner.failures[place] = error
    with pytest.raises(type(error)):
        core.step()


@pytest.mark.parametrize("place", ["dispatch", "result"])
def test_after_a_failed_step_every_call_says_so(core: EngineCore, runner: FailingRunner, place: str) -> None:
    fail(core, runner, place, RuntimeError("out of device memory"))

    assert core.abort(["x"]) == []
    assert not core.has_unfinished
    again = EngineRequest(request_id="y", prompt_token_ids=[1] * 9, sampling_params=greedy(2))
    for call in (core.step, core.reset_prefix_cache, lambda: core.add_request(again)):
        with pytest.raises(EngineDeadError, match="RuntimeError: out of device memory.*start a new one"):
            call()
    core.shutdown()


def test_an_interrupted_dispatch_breaks_the_core_too(core: EngineCore, runner: FailingRunner) -> None:
    fail(core, runner, "dispatch", KeyboardInterrupt())

    with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
        core.step()


def test_an_interrupt_that_is_held_back_does_no_harm(core: EngineCore, runner: FailingRunner) -> None:
    core.add_request(EngineRequest(request_id="x", prompt_token_ids=[1] * 9, sampling_params=greedy(20)))
    runner.failures["dispatch"] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        core.step()

    core.abort(["x"])
    (deltas,) = run(core, [[1] * 9], greedy(3))
    assert tokens(deltas) == [7] * 3


def test_an_interrupted_wait_does_no_harm(core: EngineCore, runner: FailingRunner) -> None:
    fail(core, runner, "result", KeyboardInterrupt())

    core.abort(["x"])
    (deltas,) = run(core, [[1] * 9], greedy(3))
    assert tokens(deltas) == [7] * 3
    assert core.stats().kv_cache_usage == 0
