"""Start of an engine: opens the model, loads and compiles side by side, sizes the KV pool, times each part."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import jaxserve
from jaxserve.cache.block_pool import BlockPool
from jaxserve.cache.kv_cache import KVCacheSpec, LayerCache
from jaxserve.cache.prefix_cache import PrefixCache
from jaxserve.config import Config
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compilation import CompileGuard, enable_persistent_cache
from jaxserve.runner.loading import ModelFiles, load_weights, open_model
from jaxserve.runner.memory import (
    DeviceMemory,
    blocks_from_budget,
    blocks_on_cpu,
    blocks_on_device,
    fit_context,
    num_useful_blocks,
)
from jaxserve.runner.model_graph import ModelGraph, Params, choose_backend
from jaxserve.runner.model_runner import ModelRunner, Runner
from jaxserve.runner.programs import Programs, ProgramShapes
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.settings import SchedulerSettings
from jaxserve.weights.progress import loading_progress
from jaxserve.weights.source import cache_dir

logger = logging.getLogger(__name__)

OnProgress = Callable[[str], None]

_PLATFORMS = {"cpu": "cpu", "cuda": "cuda", "tpu": "tpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDefaults:
    """Settings that depend on the kind of device, where the launch config leaves them open."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, platform: str) -> DeviceDefaults:
        """For "cpu", "gpu" or "tpu". Two CPU cores gain nothing from steps of more than 512 tokens."""
        if platform == "cpu":
            return cls(block_size=16, max_num_seqs=64, max_num_batched_tokens=512)
        return cls(block_size=16 if platform == "gpu" else 128, max_num_seqs=256, max_num_batched_tokens=8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What `EngineCore` runs on."""

    info: CoreInfo
    scheduler: Scheduler
    runner: Runner
    guard: CompileGuard


class _Phases:
    """Times the parts of the start, and tells the user."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.seconds: dict[str, float] = {}
        self.tell = on_progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        self.tell(f"{name} {self.seconds[name]:.1f} s")


def start(config: Config, on_progress: OnProgress) -> Started:
    """Bring up everything that `config` describes; raises `ConfigError` or `CheckpointError`."""
    phases = _Phases(on_progress)
    _choose_device(config)
    enable_persistent_cache(Path(config.runtime.compilation_cache_dir or cache_dir() / "compiled"))
    guard = CompileGuard()
    with phases.phase("device"):
        mesh = make_mesh(config.parallel.tensor_parallel_size)
    with phases.phase("open"):
        files = open_model(config.model)
        settings, spec = _settings(config, files, mesh)
        backend = choose_backend(
            files.decoder,
            dtype=files.dtype,
            block_size=spec.block_size,
            mesh=mesh,
            asked=None if config.runtime.attention_backend == "auto" else config.runtime.attention_backend,
        )
        graph = ModelGraph(files.decoder, dtype=files.dtype, backend=backend)
    buckets = _buckets(config, settings, mesh, files)
    assembly = _Assembly(
        config=config, files=files, graph=graph, settings=settings, spec=spec, buckets=buckets, phases=phases
    )
    params, caches, programs, shapes = assembly.assemble()
    settings = replace(settings, max_model_len=shapes.max_model_len)
    runner = ModelRunner(graph, params, programs, shapes, caches)
    pool = BlockPool(shapes.num_blocks, spec.block_size)
    prefix_cache = PrefixCache(pool) if config.cache.enable_prefix_caching else None
    guard.arm()
    info = CoreInfo(
        max_model_len=settings.max_model_len,
        vocab_size=files.decoder.vocab_size,
        num_blocks=shapes.num_blocks,
        block_size=spec.block_size,
        fingerprint=_fingerprint(config, files),
        eos_token_ids=files.eos_token_ids,
        default_sampling=files.default_sampling,
        startup_s=phases.seconds,
    )
    return Started(
        info=info,
        scheduler=Scheduler(settings, pool, prefix_cache),
        runner=runner,
        guard=guard,
    )


def _choose_device(config: Config) -> None:
    """Hold JAX to the platform asked for; a missing one is an error, never a slower one in silence."""
    device = config.runtime.device
    if device != "auto":
        jax.config.update("jax_platforms", _PLATFORMS[device])
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a CUDA plugin is not installed
        reason = next(iter(str(error).splitlines()), "JAX finds no such plugin")
        raise ConfigError(
            f"device {device!r} is not available: {reason}; install jaxserve with its extra (cuda12, cuda13, tpu), or "
            "choose --device cpu"
        ) from error
    if device != "auto" and platform != {"cuda": "gpu"}.get(device, device):
        raise ConfigError(
            f"device is {device!r}, but JAX already runs on {platform!r} in this process; set the device before JAX is "
            "first used"
        )
    logger.info("JAX %s on %s: %s", jax.__version__, platform, jax.devices()[0].device_kind)


def _settings(config: Config, files: ModelFiles, mesh: Mesh) -> tuple[SchedulerSettings, KVCacheSpec]:
    defaults = DeviceDefaults.of(mesh.devices.flat[0].platform)
    max_model_len = files.max_model_len(config.model.max_model_len)
    max_num_seqs = config.scheduler.max_num_seqs or defaults.max_num_seqs
    settings = SchedulerSettings(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens
        or max(defaults.max_num_batched_tokens, max_num_seqs),
        max_model_len=max_model_len,
        policy=config.scheduler.scheduling_policy,
        max_queued_requests=config.scheduler.max_queued_requests,
        long_prefill_token_threshold=config.scheduler.long_prefill_token_threshold,
    )
    spec = KVCacheSpec(
        num_layers=files.decoder.num_layers,
        num_kv_heads=files.decoder.num_kv_heads,
        head_dim=files.decoder.head_dim,
        block_size=config.cache.block_size or defaults.block_size,
        dtype=files.dtype,
    )
    return settings, spec


def _buckets(config: Config, settings: SchedulerSettings, mesh: Mesh, files: ModelFiles) -> Buckets:
    is_narrow_on_cpu = mesh.devices.flat[0].platform == "cpu" and files.dtype.itemsize < 4
    return Buckets.plan(
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        min_tokens=2 if is_narrow_on_cpu else 1,  # XLA:CPU has no fast 16-bit matrix-vector product: 30 ms, not 2
        token_sizes=config.runtime.token_buckets,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assembly:
    """Brings weights, pools and programs together."""

    config: Config
    files: ModelFiles
    graph: ModelGraph
    settings: SchedulerSettings
    spec: KVCacheSpec
    buckets: Buckets
    phases: _Phases

    def assemble(self) -> tuple[Params, list[LayerCache], Programs, ProgramShapes]:
        """Side by side where the pool's size is known beforehand, else one after the other."""
        useful = num_useful_blocks(
            self.spec, max_num_seqs=self.settings.max_num_seqs, max_model_len=self.settings.max_model_len
        )
        num_blocks = blocks_from_budget(self.config.cache, self.spec, num_devices=self.graph.mesh.size)
        if num_blocks is None and self.graph.mesh.devices.flat[0].platform == "cpu":
            num_blocks = blocks_on_cpu(self.spec, num_useful=useful)
        if num_blocks is None:
            return self._one_after_the_other(useful)
        shapes = self._fitting(num_blocks)
        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            loading = pool.submit(lambda: (self._load(), self._allocate(num_blocks)))
            programs = self._compile(shapes, loading)
            return *loading.result(), programs, shapes

    def _one_after_the_other(self, useful: int) -> tuple[Params, list[LayerCache], Programs, ProgramShapes]:
        params = self._load()
        with self.phases.phase("profile"):
            trial = self.settings.max_num_batched_tokens // self.spec.block_size + 2
            memory = _measure_largest_step(self.graph, params, self._shapes(trial, self.settings.max_model_len))
        num_blocks = blocks_on_device(
            self.spec,
            memory,
            utilization=self.config.cache.gpu_memory_utilization,
            num_devices=self.graph.mesh.size,
            num_useful=useful,
        )
        shapes = self._fitting(num_blocks)
        return params, self._allocate(num_blocks), self._compile(shapes), shapes

    def _fitting(self, num_blocks: int) -> ProgramShapes:
        asked = self.config.model.max_model_len
        return self._shapes(num_blocks, fit_context(self.settings.max_model_len, asked, self.spec, num_blocks))

    def _shapes(self, num_blocks: int, max_model_len: int) -> ProgramShapes:
        return ProgramShapes(
            buckets=self.buckets,
            kv_spec=self.spec,
            num_blocks=num_blocks,
            max_num_seqs=self.settings.max_num_seqs,
            max_model_len=max_model_len,
        )

    def _load(self) -> Params:
        with self.phases.phase("load"), loading_progress() as on_loaded:
            return load_weights(self.files, self.graph, on_loaded)

    def _allocate(self, num_blocks: int) -> list[LayerCache]:
        with self.phases.phase("allocate"):
            return jax.block_until_ready(self.spec.allocate(num_blocks, self.graph.mesh))

    def _compile(self, shapes: ProgramShapes, loading: Future[Any] | None = None) -> Programs:
        def on_compiled(done: int, total: int) -> None:
            self.phases.tell(f"compile {done} of {total}")
            if loading is not None and loading.done():
                loading.result()  # raises what the load raised: there is no use in compiling on

        programs = Programs(self.graph, shapes)
        num_threads = self.config.runtime.compile_threads or min(os.cpu_count() or 1, 8)
        with self.phases.phase("compile"):
            programs.compile(num_threads=num_threads, on_compiled=on_compiled)
        return programs


def _measure_largest_step(graph: ModelGraph, params: Params, shapes: ProgramShapes) -> DeviceMemory:
    """Run the largest step on padding, with a small trial pool, and read what the device had in use at its peak."""
    caches = shapes.kv_spec.allocate(shapes.num_blocks, graph.mesh)
    programs = Programs(graph, shapes)
    programs.run_largest(params, caches)
    pool_bytes = shapes.kv_spec.block_bytes * shapes.num_blocks // graph.mesh.size
    return DeviceMemory.read(graph.mesh.devices.flat[0], pool_bytes=pool_bytes)


def _fingerprint(config: Config, files: ModelFiles) -> str:
    facts = {
        "version": jaxserve.__version__,
        "jax": jax.__version__,
        "platform": jax.devices()[0].device_kind,
        "model": config.model.model_dump(mode="json"),
        "config": files.hf_config,
        "dtype": str(files.dtype),
        "parallel": config.parallel.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"fp_{digest[:12]}"
