"""`bench step`: the host's own time a step, with a model that answers at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxserve.bench.instant_model import InstantModel, instant_config
from jaxserve.bench.offline import engine_request
from jaxserve.bench.report import Report
from jaxserve.bench.statistics import distribution
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.config import load_config
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.heap import freeze_heap
from jaxserve.engine.startup import Started
from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compilation import CompileGuard
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.model_runner import ModelRunner, Runner
from jaxserve.runner.pending import PendingStep
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import LoadedModel, Programs
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings

BLOCK_SIZE = 16
PROMPT_TOKENS = 2048  # a step, while prompts are computed
WARM_UP_STEPS = 20


@dataclass(slots=True)
class TimedRunner:
    """A runner that keeps how long its two halves took, one entry a step."""

    runner: Runner
    dispatch_s: list[float] = field(default_factory=list)
    result_s: list[float] = field(default_factory=list)

    def dispatch(self, plan: StepPlan) -> _TimedStep:
        """Dispatch, and keep the time that took."""
        begin_s = time.perf_counter()
        pending = self.runner.dispatch(plan)
        self.dispatch_s.append(time.perf_counter() - begin_s)
        return _TimedStep(pending, self.result_s)


@dataclass(slots=True)
class _TimedStep:
    pending: PendingStep
    result_s: list[float]

    def is_ready(self) -> bool:
        return self.pending.is_ready()

    def result(self) -> StepResult:
        begin_s = time.perf_counter()
        result = self.pending.result()
        self.result_s.append(time.perf_counter() - begin_s)
        return result


def instant_core(*, num_running: int, max_tokens: int, max_model_len: int) -> tuple[EngineCore, TimedRunner]:
    """An engine core that is real but for its model, with blocks for `num_running` requests of `max_tokens` each."""
    settings = SchedulerSettings(
        max_num_seqs=num_running,
        max_num_batched_tokens=max(PROMPT_TOKENS, num_running),
        max_model_len=max_model_len,
        max_queued_requests=num_running,
    )
    pool = BlockPool(num_running * -(-max_tokens // BLOCK_SIZE) + 1, BLOCK_SIZE)
    buckets = Buckets(tuple(sorted({num_running, settings.max_num_batched_tokens})), (num_running,))
    runner = TimedRunner(_instant_runner(settings, buckets))
    info = CoreInfo(
        max_model_len=max_model_len,
        vocab_size=instant_config(max_model_len).vocab_size,
        num_blocks=pool.num_blocks,
        block_size=BLOCK_SIZE,
        fingerprint="instant",
    )
    scheduler = Scheduler(settings, pool, PrefixCache(pool))
    started = Started(info=info, scheduler=scheduler, runner=runner, guard=CompileGuard())
    config = load_config(None, {"model": "instant"}, environ={})
    return EngineCore(config, started=started), runner


def _instant_runner(settings: SchedulerSettings, buckets: Buckets) -> ModelRunner:
    """The runner of a server on this machine, with its programs over `InstantModel`."""
    config, mesh = instant_config(settings.max_model_len), make_mesh()
    backend = choose_backend(config, dtype=np.float32, block_size=BLOCK_SIZE, mesh=mesh)
    graph = ModelGraph(config, dtype=np.float32, backend=backend, family=InstantModel)
    shapes = ProgramShapes(
        buckets=buckets,
        kv_spec=graph.kv_cache_spec(),
        num_blocks=2,  # nothing is written to them
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
    )
    programs = Programs(graph, shapes)
    programs.compile(variants=["greedy"])
    abstract = graph.abstract_params()
    params = {name: jax.device_put(np.zeros(p.shape, p.dtype), p.sharding) for name, p in abstract.items()}
    caches = shapes.kv_spec.allocate(shapes.num_blocks, mesh)
    return ModelRunner(LoadedModel(graph=graph, params=params, programs=programs, caches=caches), shapes)


def measure_step(*, num_running: int, num_steps: int, input_len: int, max_model_len: int) -> Report:
    """Time `num_steps` steps in which `num_running` requests each get a token.

    Prompts have `input_len` tokens and up to a block more, so that each step some requests fill a block, as in a
    server, and not all in the same one.
    """
    output_len = num_steps + WARM_UP_STEPS + num_running  # nobody finishes while we measure
    input_lens = LengthRange(input_len, input_len + BLOCK_SIZE - 1)
    max_tokens = input_lens.high + output_len
    if max_tokens > max_model_len:
        raise ConfigError(f"requests grow to {max_tokens} tokens; raise max_model_len, which is {max_model_len}")
    core, runner = instant_core(num_running=num_running, max_tokens=max_tokens, max_model_len=max_model_len)
    workload = Workload(num_prompts=num_running, input_len=input_lens, output_len=LengthRange(output_len, output_len))
    for index, request in enumerate(workload.requests(core.info.vocab_size)):
        core.add_request(engine_request(f"step-{index}", request))
    while core.stats().num_waiting:
        core.step()
    freeze_heap()
    for _ in range(WARM_UP_STEPS):
        core.step()
    runner.dispatch_s.clear()
    runner.result_s.clear()
    step_s = []
    for _ in range(num_steps):
        begin_s = time.perf_counter()
        deltas = core.step()
        step_s.append(time.perf_counter() - begin_s)
        assert len(deltas) == num_running, "a step must bring a token to every request"
    core.shutdown()
    halves = zip(step_s, runner.dispatch_s, runner.result_s[:num_steps], strict=True)
    result: dict[str, float] = {"requests": num_running, "steps": num_steps}
    result |= distribution("step_ms", [seconds * 1e3 for seconds in step_s])
    # Plan, update and the core's loop.
    result |= distribution("schedule_ms", [(step - dispatch - fetch) * 1e3 for step, dispatch, fetch in halves])
    # Build the batch, pack and upload it, call the programs.
    result |= distribution("dispatch_ms", [seconds * 1e3 for seconds in runner.dispatch_s])
    # Wait for the device, and turn its arrays into each row's tokens.
    result |= distribution("result_ms", [seconds * 1e3 for seconds in runner.result_s[:num_steps]])
    settings = {
        "num_running": num_running,
        "num_steps": num_steps,
        "input_len": input_len,
        "max_model_len": max_model_len,
    }
    return Report(benchmark="host time a step", settings=settings, results=[result])
