"""`bench step`: the host's own time a step, with a model that answers at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from jaxserve.bench.offline import engine_request
from jaxserve.bench.report import Report
from jaxserve.bench.statistics import distribution
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.config import load_config
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.startup import Started
from jaxserve.layers.attention import AttentionBackend
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.batch import BatchBuilder
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compilation import CompileGuard
from jaxserve.runner.slot_table import SlotTable
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from pallas_kernels.paged_attention import AttentionGeometry

VOCAB_SIZE = 32000
TOKEN_ID = 7  # what the instant model always says
BLOCK_SIZE = 16
MAX_NUM_BATCHED_TOKENS = 8192
WARM_UP_STEPS = 20


@dataclass(slots=True)
class _InstantStep:
    answer: StepResult

    def is_ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.answer


@dataclass(slots=True)
class InstantRunner:
    """A `Runner` that builds each step's arrays as a real one does, and then answers without a device."""

    slots: SlotTable
    builder: BatchBuilder
    build_s: list[float] = field(default_factory=list)  # one a step

    def dispatch(self, plan: StepPlan) -> _InstantStep:
        """Build the batch, keep the time that took, and answer."""
        begin_s = time.perf_counter()
        self.slots.apply(plan)
        self.builder.build(plan)
        self.build_s.append(time.perf_counter() - begin_s)
        token_ids = [[TOKEN_ID] if samples else [] for samples in plan.samples]
        return _InstantStep(StepResult(step_id=plan.step_id, token_ids=token_ids))


def instant_core(*, num_running: int, max_model_len: int) -> tuple[EngineCore, InstantRunner]:
    """An engine core with real scheduling and batch building over an instant model, with room for all requests."""
    settings = SchedulerSettings(
        max_num_seqs=num_running,
        max_num_batched_tokens=max(MAX_NUM_BATCHED_TOKENS, num_running),
        max_model_len=max_model_len,
        max_queued_requests=num_running,
    )
    blocks_per_seq = -(-max_model_len // BLOCK_SIZE)
    pool = BlockPool(num_running * blocks_per_seq + 1, BLOCK_SIZE)
    slots = SlotTable(max_num_seqs=num_running, max_blocks_per_seq=blocks_per_seq)
    buckets = Buckets.plan(
        max_num_batched_tokens=settings.max_num_batched_tokens, max_num_seqs=num_running, min_tokens=1, token_sizes=None
    )
    geometry = AttentionGeometry(q_heads=1, kv_heads=1, head_dim=64, block_size=BLOCK_SIZE, dtype="float32")
    backend = AttentionBackend(mesh=make_mesh(), implementation="xla", geometry=geometry)
    runner = InstantRunner(slots, BatchBuilder(buckets, slots, backend))
    info = CoreInfo(
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        num_blocks=pool.num_blocks,
        block_size=BLOCK_SIZE,
        fingerprint="instant",
    )
    scheduler = Scheduler(settings, pool, PrefixCache(pool))
    started = Started(info=info, scheduler=scheduler, runner=runner, guard=CompileGuard())
    config = load_config(None, {"model": "instant"}, environ={})
    return EngineCore(config, started=started), runner


def measure_step(*, num_running: int, num_steps: int, input_len: int) -> Report:
    """Time `num_steps` steps in which `num_running` requests each get a token."""
    output_len = num_steps + WARM_UP_STEPS + num_running  # nobody finishes while we measure
    core, runner = instant_core(num_running=num_running, max_model_len=input_len + output_len)
    workload = Workload(
        num_prompts=num_running,
        input_len=LengthRange(input_len, input_len),
        output_len=LengthRange(output_len, output_len),
    )
    for index, request in enumerate(workload.requests(VOCAB_SIZE)):
        core.add_request(engine_request(f"step-{index}", request))
    while core.stats().num_waiting:
        core.step()
    for _ in range(WARM_UP_STEPS):
        core.step()
    runner.build_s.clear()
    step_s = []
    for _ in range(num_steps):
        begin_s = time.perf_counter()
        deltas = core.step()
        step_s.append(time.perf_counter() - begin_s)
        assert len(deltas) == num_running, "a step must bring a token to every request"
    own_s = [step - build for step, build in zip(step_s, runner.build_s, strict=True)]
    result: dict[str, float] = {"requests": num_running, "steps": num_steps}
    result |= distribution("step_ms", [seconds * 1e3 for seconds in step_s])
    result |= distribution("schedule_ms", [seconds * 1e3 for seconds in own_s])  # plan, update and the core's loop
    result |= distribution("build_ms", [seconds * 1e3 for seconds in runner.build_s])
    settings = {"num_running": num_running, "num_steps": num_steps, "input_len": input_len}
    return Report(benchmark="host time a step", settings=settings, results=[result])
