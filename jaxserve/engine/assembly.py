"""`Assembly`: brings weights, KV pools and compiled programs together, side by side where it can; `Phases` times it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

from jaxserve.cache.kv_cache import KVCacheSpec, LayerCache
from jaxserve.config import Config
from jaxserve.engine.side_by_side import GivenUp, side_by_side
from jaxserve.parallel.mesh import DATA, platform_of
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.head_programs import HeadPrograms, LoadedHead
from jaxserve.runner.loading import ModelFiles, load_weights
from jaxserve.runner.memory import (
    DeviceMemory,
    blocks_from_budget,
    blocks_on_cpu,
    blocks_on_device,
    fit_context,
    num_useful_blocks,
)
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.programs import LoadedModel, Programs
from jaxserve.scheduler.settings import SchedulerSettings
from jaxserve.weights.progress import loading_progress

OnProgress = Callable[[str], None]
Loaded: TypeAlias = LoadedModel | LoadedHead


class Phases:
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


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model as it is before anything is loaded."""

    files: ModelFiles
    graph: ModelGraph
    only_draws: bool = False  # it drafts: nobody asks it for more

    def own_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of what is loaded for it."""
        params = self.graph.abstract_params()
        return {rule.param: params[rule.param] for rule in self.graph.weight_rules()}

    def programs(self, shapes: ProgramShapes) -> Programs | HeadPrograms:
        """What is to be compiled for it."""
        shapes = replace(shapes, kv_spec=self.graph.kv_cache_spec())
        return Programs(self.graph, shapes, only_draws=self.only_draws)

    def loaded(self, params: Params, model: Params, programs: Any, caches: list[LayerCache]) -> Loaded:
        """All of it together; `model` are the parameters of the model that answers."""
        return LoadedModel(graph=self.graph, params=params, programs=programs, caches=caches)


def cache_spec(models: Sequence[ModelParts]) -> KVCacheSpec:
    """The cache of the model that answers, the first, which counts the others' bytes: pools have the same blocks."""
    first, *others = (model.graph.kv_cache_spec() for model in models)
    return replace(first, beside_bytes=sum(other.block_bytes for other in others))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Brings weights, pools and programs together: of the model, and of what drafts for it, if there is such."""

    config: Config
    mesh: Mesh
    models: tuple[ModelParts, ...]  # the one that answers first; all on that mesh
    settings: SchedulerSettings
    buckets: Buckets
    memory_share: float  # the part of a device's own limit that the engine may take
    phases: Phases
    store: ProgramStore | None = None
    agree: Callable[[str, int], int] = lambda name, value: value  # the least that any host has, by the value's name

    @property
    def spec(self) -> KVCacheSpec:
        """See `cache_spec`."""
        return cache_spec(self.models)

    def assemble(self) -> tuple[list[Loaded], ProgramShapes]:
        """Side by side where the pool's size is known beforehand, else one after the other."""
        useful = num_useful_blocks(
            self.spec, max_num_seqs=self.settings.max_num_seqs, max_model_len=self.settings.max_model_len
        )
        num_blocks = blocks_from_budget(self.config.cache, self.spec)
        if num_blocks is None and platform_of(self.mesh) == "cpu":
            num_blocks = blocks_on_cpu(self.spec, num_useful=useful, num_pools=self.mesh.shape[DATA])
            num_blocks = self.agree("num_blocks", num_blocks)
        if num_blocks is None:
            return self._one_after_the_other(useful)
        shapes = self._fitting(num_blocks)
        loaded, programs = side_by_side(
            lambda given_up: side_by_side(lambda _: self._load(given_up), lambda _: self._allocate(num_blocks)),
            lambda given_up: self._compile(shapes, given_up),
        )
        return self._together(*loaded, programs), shapes

    def _one_after_the_other(self, useful: int) -> tuple[list[Loaded], ProgramShapes]:
        given_up = GivenUp()  # never, where nothing runs beside
        params = self._load(given_up)
        with self.phases.phase("profile"):
            trial = self.settings.max_num_batched_tokens // self.spec.block_size + 2
            shapes = self._shapes(trial, self.settings.max_model_len)
            step_bytes = sum(programs.step_bytes() for programs in self._programs(shapes))
            jax.block_until_ready(params)
            device = self.mesh.local_devices[0]
            memory = DeviceMemory.read(device, share=self.memory_share, step_bytes=step_bytes)
        num_blocks = self.agree("num_blocks", blocks_on_device(self.spec, memory, num_useful=useful))
        shapes = self._fitting(num_blocks)
        # Compiled before the pool takes the memory that kernels are tried out on.
        programs = self._compile(shapes, given_up)
        return self._together(params, self._allocate(num_blocks), programs), shapes

    def _fitting(self, num_blocks: int) -> ProgramShapes:
        asked = self.config.model.max_model_len
        return self._shapes(num_blocks, fit_context(self.settings.max_model_len, asked, self.spec, num_blocks))

    def _shapes(self, num_blocks: int, max_model_len: int) -> ProgramShapes:
        return ProgramShapes(
            buckets=self.buckets,
            kv_spec=self.spec,
            num_blocks=num_blocks,
            max_num_seqs=self.settings.max_num_seqs,
            max_num_drafts=self.settings.max_num_drafts,
            max_model_len=max_model_len,
        )

    def _together(
        self, params: list[Params], caches: list[list[LayerCache]], programs: list[Programs | HeadPrograms]
    ) -> list[Loaded]:
        return [
            model.loaded(values, params[0], compiled, pools)
            for model, values, pools, compiled in zip(self.models, params, caches, programs, strict=True)
        ]

    def _programs(self, shapes: ProgramShapes) -> list[Programs | HeadPrograms]:
        return [model.programs(shapes) for model in self.models]

    def _load(self, given_up: GivenUp) -> list[Params]:
        with self.phases.phase("load"), loading_progress() as show:

            def on_loaded(name: str, done: int, total: int) -> None:
                given_up.check()
                show(name, done, total)

            return [load_weights(model.files, model.graph, on_loaded) for model in self.models]

    def _allocate(self, num_blocks: int) -> list[list[LayerCache]]:
        with self.phases.phase("allocate"):
            specs = [model.graph.kv_cache_spec() for model in self.models]
            return jax.block_until_ready([spec.allocate(num_blocks, self.mesh) for spec in specs])

    def _compile(self, shapes: ProgramShapes, given_up: GivenUp) -> list[Programs | HeadPrograms]:
        def on_compiled(done: int, total: int) -> None:
            given_up.check()
            self.phases.tell(f"compile {done} of {total}")

        all_programs = self._programs(shapes)
        num_threads = self.config.runtime.compile_threads or min(os.cpu_count() or 1, 8)
        with self.phases.phase("compile"):
            for programs in all_programs:
                programs.compile(store=self.store, num_threads=num_threads, on_compiled=on_compiled)
        return all_programs
