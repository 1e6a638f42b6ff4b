"""One decode step of the whole model, forward and sampler, beside what reading its weights and keys must take."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.models.base import DecoderConfig
from jaxserve.parallel.mesh import make_mesh, sharding
from jaxserve.runner.batch import empty_batch
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.model_graph import ModelGraph, Params, choose_backend
from jaxserve.runner.packing import Packing
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import Programs
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import abstract_inputs
from pallas_kernels.benchmark import copy_rate, time_calls
from pallas_kernels.paged_attention import build_without_tables
from tests.gpu.sizes import Sizes

_AT_ONCE = 16  # steps under way: the engine's host is one step ahead of the device, so launches hide as they do here
_WEIGHT_SCALE = 0.02


def works(sizes: Sizes) -> list[str]:
    """The copy rate, then each batch."""
    return ["copy", *map(str, sizes.batches)]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Compiles the steps of all batches at once, before anything is timed."""
    steps = DecodeSteps(sizes)
    pool = ThreadPoolExecutor(12)
    batches = [int(name) for name in names if name != "copy"]
    compiled = {batch: pool.submit(steps.compile, batch) for batch in batches}
    wait(compiled.values())

    def measure(name: str) -> dict[str, Any]:
        if name == "copy":
            return {"bytes_per_s": copy_rate(sizes.copy_bytes)}
        return steps.measure(int(name), compiled[int(name)])

    return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStep:
    """The programs of one batch, which is one bucket."""

    forward: Any
    sample: Any


class DecodeSteps:
    """The model on the device with random weights, and its decode steps."""

    def __init__(self, sizes: Sizes, mesh: Any = None) -> None:
        """`mesh`: devices to compile for, by default the one at hand."""
        self.sizes = sizes
        decoder = DecoderConfig.from_hf(sizes.model)
        self.backend = choose_backend(
            decoder,
            dtype=sizes.dtype,
            block_size=sizes.block_size,
            mesh=make_mesh() if mesh is None else mesh,
            asked=sizes.implementation,
        )
        self.graph = ModelGraph(decoder, dtype=sizes.dtype, backend=self.backend)
        buckets = Buckets(sizes.batches, sizes.batches)
        self.shapes = ProgramShapes(
            buckets=buckets,
            kv_spec=self.kv_spec,
            num_blocks=1 + sizes.batches[-1] * self.blocks_per_seq,
            max_num_seqs=sizes.batches[-1],
            max_model_len=sizes.context,
        )
        self.programs = Programs(self.graph, self.shapes)

    @property
    def kv_spec(self) -> KVCacheSpec:
        """Of the model."""
        return self.graph.kv_cache_spec()

    @property
    def blocks_per_seq(self) -> int:
        """Blocks that the context takes."""
        return -(-self.sizes.context // self.sizes.block_size)

    def compile(self, batch: int) -> CompiledStep:
        """The forward and the greedy sampler."""
        bucket = Bucket(batch, batch)
        return CompiledStep(
            forward=self.programs.lower_forward(bucket).compile(),
            sample=self.programs.lower_sample(batch, "greedy").compile(),
        )

    def read_bytes(self, batch: int) -> int:
        """What a step must read: every weight but the embedding's, of which it takes a row a token, and all keys."""
        params = self.graph.abstract_params()
        weights = sum(
            value.size * value.dtype.itemsize for name, value in params.items() if not name.startswith("embedding.")
        )
        slot_bytes = self.kv_spec.block_bytes // self.sizes.block_size
        return weights + batch * self.sizes.context * slot_bytes

    def measure(self, batch: int, compiled: Future[CompiledStep]) -> dict[str, Any]:
        """Milliseconds of a step; every sequence has the whole context, and each step writes its last position anew."""
        programs = compiled.result()
        head = {name: self._params[name] for name in self.graph.head_names()}
        params = tuple(self._params.values())  # made in the order of `abstract_params`
        packed, sample_packed, tables = map(jnp.asarray, self._packed(batch))
        inputs = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            abstract_inputs(batch, "greedy", vocab_size=self.graph.config.vocab_size),
        )
        state = {"caches": self._caches, "tokens": jnp.zeros(self.shapes.tokens_shape, jnp.int32)}

        def step() -> jax.Array:
            _, rows, _, state["caches"] = programs.forward(params, state["caches"], state["tokens"], tables, packed)
            state["tokens"], sampled = programs.sample(head, rows, state["tokens"], sample_packed, inputs)
            return sampled.token_ids

        try:
            timing = time_calls(step, at_once=_AT_ONCE, repeats=5)
            alone = time_calls(step, repeats=10)
        finally:
            self._caches = state["caches"]
        return {
            "batch": batch,
            "layers": self.graph.config.num_layers,
            "ms": timing.median_s * 1e3,
            "min_ms": timing.min_s * 1e3,
            "single_ms": alone.median_s * 1e3,
            "read_bytes": self.read_bytes(batch),
            "tokens_per_s": batch / timing.median_s,
        }

    def _packed(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the two programs are told of the batch, each i32[1, size], as there is one data shard; block tables."""
        position = self.sizes.context - 1
        tables = 1 + np.arange(batch * self.blocks_per_seq, dtype=np.int32).reshape(batch, -1)
        slots = 1 + np.arange(batch, dtype=np.int32)
        positions = np.full(batch, position, np.int32)
        block_size = self.sizes.block_size
        metadata = build_without_tables(
            [1] * batch,
            [self.sizes.context] * batch,
            tables,
            geometry=self.backend.geometry,
            implementation=self.backend.implementation,
            num_tokens=batch,
            num_rows=batch,
            blocks_per_seq=self.blocks_per_seq,
        )
        forward = ForwardBatch(
            token_slots=slots,
            positions=positions,
            kv_slots=tables[:, position // block_size] * block_size + position % block_size,
            row_slots=slots,
            sample_tokens=slots - 1,
            num_tokens=np.array(batch, np.int32),
            metadata=metadata,
        )
        empty = empty_batch(Bucket(batch, batch), self.backend, blocks_per_seq=self.blocks_per_seq)
        sample = SampleBatch(slots, positions, np.array(batch, np.int32))
        packed = Packing(ForwardBatch.from_host(empty)).pack(forward)[None], Packing(sample).pack(sample)[None]
        by_slot = np.zeros(self.shapes.tables_shape, np.int32)
        by_slot[slots] = tables
        return *packed, by_slot

    @cached_property
    def _params(self) -> Params:
        """Random weights, made on the device: norms of 1, the rest small enough for finite activations."""
        params = {}
        for index, (name, shape) in enumerate(self.graph.abstract_params().items()):
            place = sharding(self.graph.mesh, self.graph.axes(name))
            make = partial(_random, shape=shape.shape, dtype=shape.dtype.name)
            params[name] = jax.device_put(make(index), place)
        return params

    @cached_property
    def _caches(self) -> Any:
        return self.kv_spec.allocate(self.shapes.num_blocks, self.graph.mesh)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(seed: int, *, shape: tuple[int, ...], dtype: str) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(_WEIGHT_SCALE, dtype)
