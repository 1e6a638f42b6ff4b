"""`ProgramShapes`, and `ProgramArguments`: the abstract arguments that a model's programs are compiled for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import DATA, by_data_shard, on_each_data_shard, replicated, spans_hosts, to_devices
from jaxserve.runner.batch import empty_batch
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.model_graph import ModelGraph
from jaxserve.runner.packing import Packing
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import SamplingInputs, Variant, abstract_inputs
from jaxserve.sampling.sampler import SampledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramShapes:
    """All that the compiled shapes depend on."""

    buckets: Buckets
    kv_spec: KVCacheSpec
    num_blocks: int  # of a data shard
    max_num_seqs: int  # of a data shard
    max_model_len: int
    max_num_drafts: int = 0  # guessed tokens a step, of a data shard

    @property
    def blocks_per_seq(self) -> int:
        """Width of a block table."""
        return -(-self.max_model_len // self.kv_spec.block_size)

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """Of a data shard's token table, i32[slots, positions]; slot 0 is padding."""
        return (self.max_num_seqs + 1, self.max_model_len)

    @property
    def tables_shape(self) -> tuple[int, int]:
        """Of a data shard's block tables, i32[slots, blocks]; slot 0 is padding."""
        return (self.max_num_seqs + 1, self.blocks_per_seq)

    @property
    def max_new_blocks(self) -> int:
        """Blocks that a step can append to the tables of a data shard: a row of n tokens takes n / block_size or less,
        rounded up."""
        return self.max_num_seqs + self.buckets.token_sizes[-1] // self.kv_spec.block_size


class ProgramArguments:
    """What programs of one model take: packed batches a bucket, and shapes, dtypes and shardings of all else."""

    def __init__(self, graph: ModelGraph, shapes: ProgramShapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self.num_data_shards = graph.mesh.shape[DATA]
        self._by_data_shard = by_data_shard(graph.mesh)
        self._spans_hosts = spans_hosts(graph.mesh)
        self.forward_packings = {
            bucket: Packing(
                ForwardBatch.from_host(empty_batch(bucket, graph.backend, blocks_per_seq=shapes.blocks_per_seq))
            )
            for bucket in shapes.buckets.all()
        }
        self.sample_packings = {
            rows: Packing(SampleBatch(*(np.zeros(shape, np.int32) for shape in (rows, rows, ()))))
            for rows in shapes.buckets.row_sizes
        }

    def packed(self, batches: Sequence[ForwardBatch], bucket: Bucket) -> Any:
        """What the model is told of a step, an entry a data shard, as one argument."""
        return self.to_devices(self.forward_packings[bucket].pack_all(batches))

    def packed_samples(self, batches: Sequence[SampleBatch], rows: int) -> Any:
        """What the sampler is told of a step, an entry a data shard, as one argument."""
        return self.to_devices(self.sample_packings[rows].pack_all(batches))

    def to_devices(self, inputs: Any) -> Any:
        """Host arrays, in whatever tree, on their way into a program; jit itself takes those of one host alone."""
        if not self._spans_hosts:
            return inputs
        return jax.tree.map(
            lambda leaf: to_devices(leaf, self._by_data_shard) if isinstance(leaf, np.ndarray) else leaf, inputs
        )

    def results(self) -> NamedSharding:
        """Of what the host reads: on several hosts each must hold all of it."""
        return replicated(self._graph.mesh) if self._spans_hosts else self._by_data_shard

    def sampled(self, variant: Variant) -> SampledTokens:
        """Of what such a sampler gives."""
        fields = dataclasses.fields(SampledTokens) if variant == "full" else dataclasses.fields(SampledTokens)[:3]
        return SampledTokens(*(self.results() for _ in fields))

    def on_each(self, program: Callable[..., Any], *in_specs: PartitionSpec) -> Callable[..., Any]:
        """The program of one data shard, run on all of them."""
        return on_each_data_shard(self._graph.mesh, program, in_specs=in_specs)

    def split(self, first: int, *rest: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array with `first` entries a data shard."""
        shape = (first * self.num_data_shards, *rest)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._by_data_shard)

    def tokens(self) -> jax.ShapeDtypeStruct:
        """The token table."""
        return self.split(*self._shapes.tokens_shape)

    def block_tables(self) -> jax.ShapeDtypeStruct:
        """The block tables of all slots."""
        return self.split(*self._shapes.tables_shape)

    @property
    def table_bytes(self) -> int:
        """Bytes of a device's block tables."""
        return math.prod(self._shapes.tables_shape) * np.dtype(np.int32).itemsize

    def activations(self, first: int, *rest: int) -> jax.ShapeDtypeStruct:
        """Such an array of what flows between layers."""
        return self.split(first, *rest, dtype=self._graph.numerics.activations)

    def hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        """Hidden states of so many tokens or rows."""
        return self.activations(rows, self._graph.config.hidden_size)

    def head(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters that the model's logits are made of."""
        params = self._graph.abstract_params()
        return {name: params[name] for name in self._graph.head_names()}

    def caches(self) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """The KV pools of all layers."""
        return self._shapes.kv_spec.abstract(self._shapes.num_blocks, self._graph.mesh)

    def sampling_inputs(self, rows: int, variant: Variant) -> SamplingInputs:
        """What the sampler is told of so many rows."""
        return jax.tree.map(
            lambda leaf: self.split(*leaf.shape, dtype=leaf.dtype),
            abstract_inputs(rows, variant, vocab_size=self._graph.config.vocab_size),
        )


def bytes_of_a_device(params: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of a device's parts of parameters."""
    return sum(math.prod(value.sharding.shard_shape(value.shape)) * value.dtype.itemsize for value in params.values())


def sizes_of(compiled: Compiled) -> Any:
    """The compiler's count of a program's memory; `ConfigError` where it tells none."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise ConfigError(
            "the compiler does not tell how much memory a step takes; set kv_cache_memory_bytes to size the KV pool"
        )
    return sizes
