"""Every program of a draft head: `follow` the model over its tokens, `advance` over drafts, `draw` the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled, Lowered

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.parallel.mesh import EVERYWHERE, PER_DATA_SHARD, by_data_shard, to_devices
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compilation import CompileJobs, OnCompiled, compile_all
from jaxserve.runner.head_step import advance, draw, follow
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.runner.program import Program
from jaxserve.runner.program_arguments import ProgramArguments, ProgramShapes, bytes_of_a_device, sizes_of
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import VARIANTS, SamplingInputs, Variant
from jaxserve.sampling.sampler import SampledTokens


class HeadPrograms:
    """Compiled programs by shape. Caches, states and the token table are donated to the calls that change them.

    States lie in a table by slot, [slots, num_states, hidden]: a sequence's state of position p is number
    p mod num_states, so that the table holds those of a slot's last positions.
    """

    def __init__(self, graph: ModelGraph, shapes: ProgramShapes, *, num_states: int) -> None:
        """`num_states`: one more than a row may have drafts."""
        self._graph = graph
        self._shapes = shapes
        self._arguments = ProgramArguments(graph, shapes)
        self._states = self._arguments.activations(shapes.max_num_seqs + 1, num_states, graph.config.hidden_size)
        self._can_advance = num_states > 2  # the first draft needs no state but the model's
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    def new_states(self) -> jax.Array:
        """A table of zeros."""
        return to_devices(np.zeros(self._states.shape, self._states.dtype), self._states.sharding)

    def follow(
        self,
        params: Params,
        caches: list[LayerCache],
        states: jax.Array,
        tokens: jax.Array,
        block_tables: jax.Array,
        bucket: Bucket,
        batches: Sequence[ForwardBatch],
        features: jax.Array,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """See `head_step.follow`; `caches` and `states` are donated."""
        packed = self._arguments.packed(batches, bucket)
        return self._compiled["follow", bucket](params, caches, states, tokens, block_tables, packed, features)

    def advance(
        self,
        params: Params,
        caches: list[LayerCache],
        states: jax.Array,
        tokens: jax.Array,
        block_tables: jax.Array,
        bucket: Bucket,
        batches: Sequence[ForwardBatch],
    ) -> tuple[jax.Array, list[LayerCache]]:
        """See `head_step.advance`; `caches` and `states` are donated."""
        packed = self._arguments.packed(batches, bucket)
        return self._compiled["advance", bucket](params, caches, states, tokens, block_tables, packed)

    def draw(
        self,
        head: Params,
        states: jax.Array,
        tokens: jax.Array,
        batches: Sequence[SampleBatch],
        inputs: SamplingInputs,
        variant: Variant,
    ) -> tuple[jax.Array, SampledTokens]:
        """See `head_step.draw`; `tokens` is donated."""
        rows = len(batches[0].slots)
        packed, inputs = self._arguments.packed_samples(batches, rows), self._arguments.to_devices(inputs)
        return self._compiled["draw", rows, variant](head, states, tokens, packed, inputs)

    # Compilation -----------------------------------------------------------------------------------------------------

    def compile(
        self,
        *,
        store: ProgramStore | None = None,
        num_threads: int | None = None,
        on_compiled: OnCompiled | None = None,
    ) -> None:
        """Compile everything that `store` has not, the largest step first."""
        jobs: dict[tuple[Any, ...], Program] = {}
        buckets = self._shapes.buckets
        for bucket in buckets.all():
            jobs["follow", bucket] = self._follow(bucket)
        if self._can_advance:
            most = buckets.pick(min(self._shapes.max_num_seqs, buckets.token_sizes[-1]))
            for bucket in buckets.all():
                if bucket <= most:
                    jobs["advance", bucket] = self._advance(bucket)
        for rows in buckets.row_sizes:
            for variant in VARIANTS:
                jobs["draw", rows, variant] = self._draw(rows, variant)
        described = store and (store, f"{self._graph.description} {self._shapes} {self._states}")
        self._compiled |= compile_all(jobs, store=described, num_threads=num_threads, on_compiled=on_compiled)

    def step_bytes(self, compile_jobs: CompileJobs = compile_all) -> int:
        """Bytes that the head's part of a step takes on each device; see `Programs.step_bytes`."""
        bucket = self._shapes.buckets.all()[0]
        compiled = compile_jobs(
            {
                "follow": self._follow(bucket),
                "draw": self._draw(bucket.num_rows, "full"),
            }
        )
        sizes = {name: sizes_of(program) for name, program in compiled.items()}
        held = sizes["draw"].argument_size_in_bytes - bytes_of_a_device(self._arguments.head())
        held += sum(size.output_size_in_bytes - size.alias_size_in_bytes for size in sizes.values())
        return max(size.temp_size_in_bytes for size in sizes.values()) + 2 * held

    def lower_forward(self, bucket: Bucket) -> Lowered:
        """Trace and lower the head's pass behind the model's, for one bucket."""
        return self._follow(bucket).lower()

    def lower_advance(self, bucket: Bucket) -> Lowered:
        """Trace and lower a pass over drafts, for one bucket."""
        return self._advance(bucket).lower()

    def lower_sample(self, rows: int, variant: Variant) -> Lowered:
        """Trace and lower the head's logits and the sampler for one number of rows."""
        return self._draw(rows, variant).lower()

    # What they are compiled for --------------------------------------------------------------------------------------

    def _follow(self, bucket: Bucket) -> Program:
        config: Any = self._graph.config
        packing = self._arguments.forward_packings[bucket]

        def program(
            params: Params,
            caches: list[LayerCache],
            states: jax.Array,
            tokens: jax.Array,
            block_tables: jax.Array,
            packed: jax.Array,
            features: jax.Array,
        ) -> tuple[jax.Array, list[LayerCache]]:
            batch = packing.unpack(packed[0])
            return follow(self._graph, params, caches, states, tokens, block_tables, batch, features)

        features = self._arguments.activations(bucket.num_tokens, config.num_features)
        return self._pass(program, packing.size, features)

    def _advance(self, bucket: Bucket) -> Program:
        packing = self._arguments.forward_packings[bucket]

        def program(
            params: Params,
            caches: list[LayerCache],
            states: jax.Array,
            tokens: jax.Array,
            block_tables: jax.Array,
            packed: jax.Array,
        ) -> tuple[jax.Array, list[LayerCache]]:
            return advance(self._graph, params, caches, states, tokens, block_tables, packing.unpack(packed[0]))

        return self._pass(program, packing.size)

    def _pass(self, program: Callable[..., Any], packed_size: int, *more: jax.ShapeDtypeStruct) -> Program:
        given = self._arguments
        caches, tables, packed = given.caches(), given.block_tables(), given.split(1, packed_size)
        params = self._graph.abstract_params()
        return Program(
            function=given.on_each(program, EVERYWHERE, *(PER_DATA_SHARD for _ in range(5 + len(more)))),
            arguments=(params, caches, self._states, given.tokens(), tables, packed, *more),
            results=(by_data_shard(self._graph.mesh), jax.tree.map(lambda pool: pool.sharding, caches)),
            donated=(1, 2),
        )

    def _draw(self, rows: int, variant: Variant) -> Program:
        given = self._arguments
        packing = given.sample_packings[rows]

        def program(
            head: Params, states: jax.Array, tokens: jax.Array, packed: jax.Array, inputs: SamplingInputs
        ) -> tuple[jax.Array, SampledTokens]:
            return draw(self._graph, head, states, tokens, packing.unpack(packed[0]), inputs, variant=variant)

        packed, inputs = given.split(1, packing.size), given.sampling_inputs(rows, variant)
        return Program(
            function=given.on_each(program, EVERYWHERE, *(PER_DATA_SHARD for _ in range(4))),
            arguments=(given.head(), self._states, given.tokens(), packed, inputs),
            results=(by_data_shard(self._graph.mesh), given.sampled(variant)),
            donated=(2,),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedHead:
    """A draft head that is ready to run; its parameters hold those it shares with the model."""

    graph: ModelGraph
    params: Mapping[str, jax.Array]
    programs: HeadPrograms
    caches: list[LayerCache]
