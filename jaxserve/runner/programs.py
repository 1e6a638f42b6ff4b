"""Every program a step can need, compiled ahead of time for its shapes, and the calls that pick the right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled, Lowered

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.parallel.mesh import EVERYWHERE, PER_DATA_SHARD, by_data_shard, replicated
from jaxserve.runner.buckets import Bucket
from jaxserve.runner.compilation import CompileJobs, OnCompiled, compile_all
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.runner.program_arguments import ProgramArguments, ProgramShapes, bytes_of_a_device, sizes_of
from jaxserve.runner.step import (
    PROMPT_LOGPROB_ROWS,
    ForwardBatch,
    SampleBatch,
    forward,
    sample_rows,
    score_prompt,
    write_drafts,
    write_slot,
)
from jaxserve.sampling.inputs import VARIANTS, SamplingInputs, Variant
from jaxserve.sampling.sampler import SampledTokens


class Programs:
    """Compiled programs by shape. Caches and the token table are donated to the calls that change them.

    What differs between data shards comes as a list with an entry a shard, or with their parts along the first axis.
    """

    def __init__(self, graph: ModelGraph, shapes: ProgramShapes, *, only_draws: bool = False) -> None:
        """With `only_draws` no more than `forward` and `sample` is compiled."""
        self._only_draws = only_draws
        self._graph = graph
        self._shapes = shapes
        self._arguments = ProgramArguments(graph, shapes)
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        params: Params,
        caches: list[LayerCache],
        tokens: jax.Array,
        bucket: Bucket,
        batches: Sequence[ForwardBatch],
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, list[LayerCache]]:
        """See `step.forward`; `caches` are donated."""
        packed = np.stack([self._arguments.forward_packings[bucket].pack(batch) for batch in batches])
        return self._compiled["forward", bucket](params, caches, tokens, self._arguments.to_devices(packed))

    def sample(
        self,
        head: Params,
        hidden: jax.Array,
        tokens: jax.Array,
        batches: Sequence[SampleBatch],
        inputs: SamplingInputs,
        variant: Variant,
    ) -> tuple[jax.Array, SampledTokens]:
        """See `step.sample_rows`; `tokens` is donated."""
        rows = hidden.shape[0] // len(batches)
        packed = np.stack([self._arguments.sample_packings[rows].pack(batch) for batch in batches])
        packed, inputs = self._arguments.to_devices((packed, inputs))
        return self._compiled["sample", rows, variant](head, hidden, tokens, packed, inputs)

    def score_prompt(
        self, head: Params, hidden: jax.Array, indices: np.ndarray, target_ids: np.ndarray
    ) -> SampledTokens:
        """See `step.score_prompt`; `PROMPT_LOGPROB_ROWS` positions a data shard."""
        program = self._compiled["score", hidden.shape[0] // self._arguments.num_data_shards]
        return program(head, hidden, *self._arguments.to_devices((indices, target_ids)))

    def write_slot(self, tokens: jax.Array, slot: int, row: np.ndarray) -> jax.Array:
        """See `step.write_slot`; `slot` counts over all data shards, `tokens` is donated."""
        shard, slot = divmod(slot, self._shapes.tokens_shape[0])
        slots = np.zeros(self._arguments.num_data_shards, np.int32)  # the others write to their padding
        slots[shard] = slot
        return self._compiled[("write_slot",)](tokens, self._arguments.to_devices(slots), row)

    def write_drafts(self, tokens: jax.Array, drafts: np.ndarray) -> jax.Array:
        """See `step.write_drafts`; slots count over all data shards, `tokens` is donated.

        Fewer drafts than the shape of a shard holds go to its padding slot.
        """
        slots_per_shard = self._shapes.tokens_shape[0]
        padded = np.zeros((self._arguments.num_data_shards, 3, self._shapes.max_num_drafts), np.int32)
        for shard, part in enumerate(padded):
            own = drafts[:, drafts[0] // slots_per_shard == shard]
            part[:, : own.shape[1]] = own
            part[0, : own.shape[1]] -= shard * slots_per_shard
        padded = padded.reshape(-1, self._shapes.max_num_drafts)
        return self._compiled[("write_drafts",)](tokens, self._arguments.to_devices(padded))

    # Compilation -----------------------------------------------------------------------------------------------------

    def compile(
        self,
        *,
        variants: Sequence[Variant] = VARIANTS,
        num_threads: int | None = None,
        on_compiled: OnCompiled | None = None,
    ) -> None:
        """Compile everything, the largest step first; of the sampler these variants."""
        jobs: dict[tuple[Any, ...], Callable[[], Lowered]] = {}
        for bucket in self._shapes.buckets.all():
            jobs["forward", bucket] = partial(self.lower_forward, bucket)
        for rows in self._shapes.buckets.row_sizes:
            for variant in variants:
                jobs["sample", rows, variant] = partial(self.lower_sample, rows, variant)
        if not self._only_draws:
            for num_tokens in self._shapes.buckets.token_sizes:
                jobs["score", num_tokens] = partial(self._lower_score, num_tokens)
            jobs[("write_slot",)] = self._lower_write_slot
            if self._shapes.max_num_drafts:
                jobs[("write_drafts",)] = self._lower_write_drafts
        self._compiled |= compile_all(jobs, num_threads=num_threads, on_compiled=on_compiled)

    def step_bytes(self, compile_jobs: CompileJobs = compile_all) -> int:
        """Bytes that steps take on each device beside weights and pools, as the compiler counts them.

        The largest temporaries count once: a device runs one program at a time. All else that a step holds (its inputs
        and outputs, the token table among them) counts twice: a step is dispatched while another one runs. Compiles
        the largest programs; `ConfigError` where the compiler tells no sizes.
        """
        bucket = self._shapes.buckets.all()[0]
        compiled = compile_jobs(
            {
                "forward": partial(self.lower_forward, bucket),
                "sample": partial(self.lower_sample, bucket.num_rows, "full"),
                "score": partial(self._lower_score, bucket.num_tokens),
            }
        )
        sizes = {name: sizes_of(program) for name, program in compiled.items()}
        head_bytes = bytes_of_a_device(self._arguments.head())
        held = sizes["sample"].argument_size_in_bytes - head_bytes
        held += sum(size.output_size_in_bytes - size.alias_size_in_bytes for size in sizes.values())
        return max(size.temp_size_in_bytes for size in sizes.values()) + 2 * held

    def lower_forward(self, bucket: Bucket) -> Lowered:
        """Trace and lower the model for one bucket."""
        packing = self._arguments.forward_packings[bucket]

        def program(
            params: Params, caches: list[LayerCache], tokens: jax.Array, packed: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array | None, list[LayerCache]]:
            return forward(self._graph, params, caches, tokens, packing.unpack(packed[0]))

        given = self._arguments
        caches, split = given.caches(), by_data_shard(self._graph.mesh)
        out = (split, split, split, jax.tree.map(lambda pool: pool.sharding, caches))
        sharded = self._arguments.on_each(program, EVERYWHERE, PER_DATA_SHARD, PER_DATA_SHARD, PER_DATA_SHARD)
        jitted = jax.jit(sharded, donate_argnums=1, out_shardings=out)
        return jitted.lower(self._graph.abstract_params(), caches, given.tokens(), given.split(1, packing.size))

    def lower_sample(self, rows: int, variant: Variant) -> Lowered:
        """Trace and lower the head and the sampler for one number of rows."""
        packing = self._arguments.sample_packings[rows]

        def program(
            head: Params, hidden: jax.Array, tokens: jax.Array, packed: jax.Array, inputs: SamplingInputs
        ) -> tuple[jax.Array, SampledTokens]:
            return sample_rows(self._graph, head, hidden, tokens, packing.unpack(packed[0]), inputs, variant=variant)

        sharded = self._arguments.on_each(program, EVERYWHERE, *(PER_DATA_SHARD for _ in range(4)))
        given = self._arguments
        jitted = jax.jit(sharded, donate_argnums=2, out_shardings=(by_data_shard(self._graph.mesh), given.results()))
        packed, inputs = given.split(1, packing.size), given.sampling_inputs(rows, variant)
        return jitted.lower(given.head(), given.hidden(rows), given.tokens(), packed, inputs)

    def _lower_score(self, num_tokens: int) -> Lowered:
        program = partial(score_prompt, self._graph)
        sharded = self._arguments.on_each(program, EVERYWHERE, PER_DATA_SHARD, PER_DATA_SHARD, PER_DATA_SHARD)
        jitted = jax.jit(sharded, out_shardings=self._arguments.results())
        rows = self._arguments.split(PROMPT_LOGPROB_ROWS)
        return jitted.lower(self._arguments.head(), self._arguments.hidden(num_tokens), rows, rows)

    def _lower_write_slot(self) -> Lowered:
        sharded = self._arguments.on_each(write_slot, PER_DATA_SHARD, PER_DATA_SHARD, EVERYWHERE)
        jitted = jax.jit(sharded, donate_argnums=0, out_shardings=by_data_shard(self._graph.mesh))
        row = jax.ShapeDtypeStruct(self._shapes.tokens_shape[1:], jnp.int32, sharding=replicated(self._graph.mesh))
        return jitted.lower(self._arguments.tokens(), self._arguments.split(1), row)

    def _lower_write_drafts(self) -> Lowered:
        sharded = self._arguments.on_each(write_drafts, PER_DATA_SHARD, PER_DATA_SHARD)
        jitted = jax.jit(sharded, donate_argnums=0, out_shardings=by_data_shard(self._graph.mesh))
        return jitted.lower(self._arguments.tokens(), self._arguments.split(3, self._shapes.max_num_drafts))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run."""

    graph: ModelGraph
    params: Params
    programs: Programs
    caches: list[LayerCache]
