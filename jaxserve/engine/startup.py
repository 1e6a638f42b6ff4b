"""Start of an engine: from a launch config to the scheduler and the runner that `EngineCore` drives."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxserve
from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.config import Config
from jaxserve.engine.assembly import Assembly, OnProgress, Phases
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.device import DeviceDefaults, choose_device
from jaxserve.engine.drafting import check_tokens, make_drafter, max_num_drafts, open_models
from jaxserve.engine.grammar_vocabulary import vocabulary_of_grammars
from jaxserve.engine.hosts.plans import Hosts, LeadingHosts, LeadingRunner, require_same, smallest
from jaxserve.errors import ConfigError
from jaxserve.layers.numerics import Numerics
from jaxserve.parallel.mesh import make_mesh, platform_of
from jaxserve.parallel.multihost import own_compile_cache
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compilation import CompileGuard, keep_programs
from jaxserve.runner.grammars import SlotGrammars
from jaxserve.runner.loading import ModelFiles, open_model
from jaxserve.runner.model_graph import choose_backend
from jaxserve.runner.model_runner import ModelRunner, Runner
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import LoadedModel
from jaxserve.scheduler.data_parallel import DataParallelScheduler
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from jaxserve.structured.compiler import GrammarCompiler, no_vocabulary
from jaxserve.weights.source import cache_dir

SAME_BACKEND = "install the same compilers on every host, or set attention_backend to one that all have"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What `EngineCore` runs on."""

    info: CoreInfo
    scheduler: Scheduler | DataParallelScheduler
    runner: Runner
    guard: CompileGuard
    grammars: GrammarCompiler = field(default_factory=lambda: GrammarCompiler(no_vocabulary))


def start(config: Config, on_progress: OnProgress, hosts: Hosts | None = None) -> Started:
    """Bring up everything that `config` describes; raises `ConfigError` or `CheckpointError`.

    `hosts` are the other engine processes where the config names several hosts: all start, or none.
    """
    if hosts is None and config.parallel.nnodes > 1:
        raise ConfigError(f"nnodes is {config.parallel.nnodes}: only 'jaxserve serve' runs on several hosts")
    phases = Phases(on_progress)
    memory_share = choose_device(config)
    guard = CompileGuard()
    with phases.phase("device"):
        parallel = config.parallel
        mesh = make_mesh(parallel.tensor_parallel_size, data_parallel_size=parallel.data_parallel_size)
        folder = own_compile_cache(Path(config.runtime.compilation_cache_dir or cache_dir() / "compiled"))
        store = keep_programs(folder, mesh)
    with phases.phase("open"):
        files = open_model(config.model)
        defaults = DeviceDefaults.of(platform_of(mesh))
        settings = scheduler_settings(config, files, defaults)
        backend = choose_backend(
            files.decoder,
            dtype=files.dtype,
            block_size=config.cache.block_size or defaults.block_size,
            mesh=mesh,
            asked=None if config.runtime.attention_backend == "auto" else config.runtime.attention_backend,
        )
        require_same(hosts, "the kind of device", jax.local_devices()[0].device_kind, hint="a group needs one kind")
        require_same(hosts, "the attention backend", backend.implementation, hint=SAME_BACKEND)
        models = open_models(config, files, backend, max_model_len=settings.max_model_len)
        check_tokens(config)
    assembly = Assembly(
        config=config,
        mesh=mesh,
        models=models,
        settings=settings,
        buckets=step_buckets(config, settings, models[0].graph.numerics),
        memory_share=memory_share,
        phases=phases,
        store=store,
        agree=partial(smallest, hosts),
    )
    (loaded, *drafting), shapes = assembly.assemble()
    assert isinstance(loaded, LoadedModel)
    settings = replace(settings, max_model_len=shapes.max_model_len)
    compiler = GrammarCompiler(partial(vocabulary_of_grammars, config.model, files))
    grammars = SlotGrammars(compiler)
    runner: Runner = ModelRunner(loaded, shapes, drafting=next(iter(drafting), None), grammars=grammars)
    if isinstance(hosts, LeadingHosts):
        runner = LeadingRunner(runner, hosts)
    smallest(hosts, "ready", 1)  # nobody serves before all can follow
    guard.arm()
    info = CoreInfo(
        max_model_len=settings.max_model_len,
        vocab_size=files.decoder.vocab_size,
        num_blocks=shapes.num_blocks * parallel.data_parallel_size,
        block_size=shapes.kv_spec.block_size,
        fingerprint=_fingerprint(config, files),
        eos_token_ids=files.eos_token_ids,
        default_sampling=files.default_sampling,
        startup_s=phases.seconds,
    )
    return Started(
        info=info,
        scheduler=_scheduler(config, settings, shapes, grammars),
        runner=runner,
        grammars=compiler,
        guard=guard,
    )


def _scheduler(
    config: Config, settings: SchedulerSettings, shapes: ProgramShapes, grammars: SlotGrammars
) -> Scheduler | DataParallelScheduler:
    """One for each data shard, and what makes one of several."""
    schedulers = []
    for shard in range(config.parallel.data_parallel_size):
        pool = BlockPool(shapes.num_blocks, shapes.kv_spec.block_size)
        prefix_cache = PrefixCache(pool) if config.cache.enable_prefix_caching else None
        first_slot = shard * shapes.tokens_shape[0] + 1
        drafter = make_drafter(config.speculative.speculative_config, shapes.buckets, grammars)
        schedulers.append(Scheduler(replace(settings, first_slot=first_slot), pool, prefix_cache, drafter))
    if len(schedulers) == 1:
        return schedulers[0]
    return DataParallelScheduler(schedulers, max_queued_requests=settings.max_queued_requests)


def scheduler_settings(config: Config, files: ModelFiles, defaults: DeviceDefaults) -> SchedulerSettings:
    """The limits of each data shard's scheduler, with the device's defaults where the config leaves them open."""
    max_model_len = files.max_model_len(config.model.max_model_len)
    max_num_seqs = config.scheduler.max_num_seqs or defaults.max_num_seqs
    return SchedulerSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens
        or max(defaults.max_num_batched_tokens, max_num_seqs),
        max_num_drafts=max_num_drafts(config.speculative.speculative_config, max_num_seqs),
        max_model_len=max_model_len,
        policy=config.scheduler.scheduling_policy,
        max_queued_requests=config.scheduler.max_queued_requests,
        long_prefill_token_threshold=config.scheduler.long_prefill_token_threshold,
    )


def step_buckets(config: Config, settings: SchedulerSettings, numerics: Numerics) -> Buckets:
    """The padded step sizes that are compiled."""
    # XLA:CPU has no fast 16-bit matrix-vector product: 30 ms, not 2, for a head of 49,152 tokens.
    is_slow_alone = numerics.products == "xla_cpu" and jnp.dtype(numerics.weights).itemsize < 4
    return Buckets.plan(
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=min(settings.max_num_samples, settings.max_num_batched_tokens),
        min_tokens=2 if is_slow_alone else 1,
        token_sizes=config.runtime.token_buckets,
    )


def _fingerprint(config: Config, files: ModelFiles) -> str:
    facts = {
        "version": jaxserve.__version__,
        "jax": jax.__version__,
        "platform": jax.devices()[0].device_kind,
        "model": config.model.model_dump(mode="json"),
        "config": files.hf_config,
        "dtype": str(files.dtype),
        "parallel": config.parallel.model_dump(mode="json", include={"tensor_parallel_size", "data_parallel_size"}),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"fp_{digest[:12]}"
