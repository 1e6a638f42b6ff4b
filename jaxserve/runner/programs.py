"""Every program a step can need, compiled ahead of time for its shapes, and the calls that pick the right one."""

from __future__ import annotations

from collections.abc import Sequence
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
from jaxserve.runner.program import Program
from jaxserve.runner.program_arguments import ProgramArguments, ProgramShapes, bytes_of_a_device, sizes_of
from jaxserve.runner.program_store import ProgramStore
from jaxserve.runner.step import (
    PROMPT_LOGPROB_ROWS,
    ForwardBatch,
    SampleBatch,
    forward,
    sample_rows,
    score_prompt,
    take_rows,
    write_entries,
    write_slot,
)
from jaxserve.sampling.inputs import VARIANTS, SamplingInputs, Variant
from jaxserve.sampling.sampler import SampledTokens


class Programs:
    """Compiled programs by shape. Caches, token table and block tables are donated to the calls that change them.

    What differs between data shards comes as a list with an entry a shard, or with their parts along the first axis.
    """

    def __init__(self, graph: ModelGraph, shapes: ProgramShapes, *, only_draws: bool = False) -> None:
        """With `only_draws` no more than `forward` and `sample` is compiled."""
        self._only_draws = only_draws
        self._graph = graph
        self._shapes = shapes
        self._arguments = ProgramArguments(graph, shapes)
        self._param_names = tuple(graph.abstract_params())
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        params: Params,
        caches: list[LayerCache],
        tokens: jax.Array,
        block_tables: jax.Array,
        bucket: Bucket,
        batches: Sequence[ForwardBatch],
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, list[LayerCache]]:
        """See `step.forward`; `caches` are donated."""
        values = tuple(params[name] for name in self._param_names)
        packed = self._arguments.packed(batches, bucket)
        return self._compiled["forward", bucket](values, caches, tokens, block_tables, packed)

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
        packed, inputs = self._arguments.packed_samples(batches, rows), self._arguments.to_devices(inputs)
        return self._compiled["sample", rows, variant](head, hidden, tokens, packed, inputs)

    def score_prompt(
        self, head: Params, hidden: jax.Array, indices: np.ndarray, target_ids: np.ndarray
    ) -> SampledTokens:
        """See `step.score_prompt`; `PROMPT_LOGPROB_ROWS` positions a data shard."""
        indices, target_ids = self._arguments.to_devices((indices, target_ids))
        rows = self._compiled["take_rows", hidden.shape[0] // self._arguments.num_data_shards](hidden, indices)
        return self._compiled[("score_prompt",)](head, rows, target_ids)

    def write_slot(
        self, tokens: jax.Array, block_tables: jax.Array, slot: int, token_row: np.ndarray, table_row: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """See `step.write_slot`; `slot` counts over all data shards, `tokens` and `block_tables` are donated."""
        shard, slot = divmod(slot, self._shapes.tokens_shape[0])
        slots = np.zeros(self._arguments.num_data_shards, np.int32)  # the others write to their padding
        slots[shard] = slot
        program = self._compiled[("write_slot",)]
        return program(tokens, block_tables, self._arguments.to_devices(slots), token_row, table_row)

    def write_blocks(self, block_tables: jax.Array, blocks: np.ndarray) -> jax.Array:
        """See `step.write_entries`; slots count over all data shards, `block_tables` are donated."""
        return self._compiled[("write_blocks",)](block_tables, self._entries(blocks, self._shapes.max_new_blocks))

    def write_drafts(self, tokens: jax.Array, drafts: np.ndarray) -> jax.Array:
        """See `step.write_entries`; slots count over all data shards, `tokens` is donated."""
        return self._compiled[("write_drafts",)](tokens, self._entries(drafts, self._shapes.max_num_drafts))

    def _entries(self, entries: np.ndarray, size: int) -> Any:
        """Each data shard's own of i32[3, entries], padded to `size`: zeros in its padding slot."""
        slots_per_shard = self._shapes.tokens_shape[0]
        padded = np.zeros((self._arguments.num_data_shards, 3, size), np.int32)
        for shard, part in enumerate(padded):
            own = entries[:, entries[0] // slots_per_shard == shard]
            part[:, : own.shape[1]] = own
            part[0, : own.shape[1]] -= shard * slots_per_shard
        return self._arguments.to_devices(padded.reshape(-1, size))

    # Compilation -----------------------------------------------------------------------------------------------------

    def compile(
        self,
        *,
        variants: Sequence[Variant] = VARIANTS,
        store: ProgramStore | None = None,
        num_threads: int | None = None,
        on_compiled: OnCompiled | None = None,
    ) -> None:
        """Compile everything that `store` has not, the largest step first; of the sampler these variants."""
        jobs: dict[tuple[Any, ...], Program] = {}
        for bucket in self._shapes.buckets.all():
            jobs["forward", bucket] = self._forward(bucket)
        for rows in self._shapes.buckets.row_sizes:
            for variant in variants:
                jobs["sample", rows, variant] = self._sample(rows, variant)
        if not self._only_draws:
            jobs |= self._small()
        described = store and (store, f"{self._graph.description} {self._shapes}")
        self._compiled |= compile_all(jobs, store=described, num_threads=num_threads, on_compiled=on_compiled)

    def step_bytes(self, compile_jobs: CompileJobs = compile_all) -> int:
        """Bytes that steps take on each device beside weights and pools, as the compiler counts them.

        The largest temporaries count once: a device runs one program at a time. All else that a step holds (its inputs
        and outputs, the token table among them) counts twice: a step is dispatched while another one runs. Compiles
        the largest programs; `ConfigError` where the compiler tells no sizes.
        """
        bucket = self._shapes.buckets.all()[0]
        compiled = compile_jobs(
            {
                "forward": self._forward(bucket),
                "sample": self._sample(bucket.num_rows, "full"),
                "score": self._score_prompt(),
            }
        )
        sizes = {name: sizes_of(program) for name, program in compiled.items()}
        head_bytes = bytes_of_a_device(self._arguments.head())
        held = sizes["sample"].argument_size_in_bytes - head_bytes + self._arguments.table_bytes
        held += sum(size.output_size_in_bytes - size.alias_size_in_bytes for size in sizes.values())
        return max(size.temp_size_in_bytes for size in sizes.values()) + 2 * held

    def lower_forward(self, bucket: Bucket) -> Lowered:
        """Trace and lower the model for one bucket."""
        return self._forward(bucket).lower()

    def lower_sample(self, rows: int, variant: Variant) -> Lowered:
        """Trace and lower the head and the sampler for one number of rows."""
        return self._sample(rows, variant).lower()

    def lower_small(self, *key: str | int) -> Lowered:
        """Trace and lower a small program by its name, `take_rows` by its name and the step's tokens."""
        return self._small()[key].lower()

    # What they are compiled for --------------------------------------------------------------------------------------

    def _forward(self, bucket: Bucket) -> Program:
        """The model's. Parameters come in order and without names: each call would sort the keys of a dict."""
        packing = self._arguments.forward_packings[bucket]

        def program(
            values: tuple[jax.Array, ...],
            caches: list[LayerCache],
            tokens: jax.Array,
            block_tables: jax.Array,
            packed: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array | None, list[LayerCache]]:
            params = dict(zip(self._param_names, values, strict=True))
            return forward(self._graph, params, caches, tokens, block_tables, packing.unpack(packed[0]))

        given = self._arguments
        caches, split = given.caches(), by_data_shard(self._graph.mesh)
        features = split if self._graph.config.feature_layers else None
        return Program(
            function=given.on_each(program, EVERYWHERE, *(PER_DATA_SHARD for _ in range(4))),
            arguments=(
                tuple(self._graph.abstract_params().values()),
                *(caches, given.tokens(), given.block_tables(), given.split(1, packing.size)),
            ),
            results=(split, split, features, jax.tree.map(lambda pool: pool.sharding, caches)),
            donated=(1,),
        )

    def _sample(self, rows: int, variant: Variant) -> Program:
        packing = self._arguments.sample_packings[rows]

        def program(
            head: Params, hidden: jax.Array, tokens: jax.Array, packed: jax.Array, inputs: SamplingInputs
        ) -> tuple[jax.Array, SampledTokens]:
            return sample_rows(self._graph, head, hidden, tokens, packing.unpack(packed[0]), inputs, variant=variant)

        given = self._arguments
        packed, inputs = given.split(1, packing.size), given.sampling_inputs(rows, variant)
        return Program(
            function=given.on_each(program, EVERYWHERE, *(PER_DATA_SHARD for _ in range(4))),
            arguments=(given.head(), given.hidden(rows), given.tokens(), packed, inputs),
            results=(by_data_shard(self._graph.mesh), given.sampled(variant)),
            donated=(2,),
        )

    def _small(self) -> dict[tuple[Any, ...], Program]:
        """Those that score prompts and that write to the tables of tokens and of blocks."""
        given, shapes = self._arguments, self._shapes
        programs: dict[tuple[Any, ...], Program] = {
            ("take_rows", num_tokens): self._take_rows(num_tokens) for num_tokens in shapes.buckets.token_sizes
        }
        programs[("score_prompt",)] = self._score_prompt()
        programs[("write_slot",)] = self._write_slot()
        programs[("write_blocks",)] = self._write_entries(given.block_tables(), shapes.max_new_blocks)
        if shapes.max_num_drafts:
            programs[("write_drafts",)] = self._write_entries(given.tokens(), shapes.max_num_drafts)
        return programs

    def _take_rows(self, num_tokens: int) -> Program:
        given = self._arguments
        return Program(
            function=given.on_each(take_rows, PER_DATA_SHARD, PER_DATA_SHARD),
            arguments=(given.hidden(num_tokens), given.split(PROMPT_LOGPROB_ROWS)),
            results=by_data_shard(self._graph.mesh),
        )

    def _score_prompt(self) -> Program:
        given = self._arguments
        return Program(
            function=given.on_each(partial(score_prompt, self._graph), EVERYWHERE, PER_DATA_SHARD, PER_DATA_SHARD),
            arguments=(given.head(), given.hidden(PROMPT_LOGPROB_ROWS), given.split(PROMPT_LOGPROB_ROWS)),
            results=given.sampled("full"),
        )

    def _write_slot(self) -> Program:
        given, split = self._arguments, by_data_shard(self._graph.mesh)
        rows = (
            jax.ShapeDtypeStruct(shape[1:], jnp.int32, sharding=replicated(self._graph.mesh))
            for shape in (self._shapes.tokens_shape, self._shapes.tables_shape)
        )
        return Program(
            function=given.on_each(write_slot, *(PER_DATA_SHARD for _ in range(3)), EVERYWHERE, EVERYWHERE),
            arguments=(given.tokens(), given.block_tables(), given.split(1), *rows),
            results=(split, split),
            donated=(0, 1),
        )

    def _write_entries(self, table: jax.ShapeDtypeStruct, size: int) -> Program:
        return Program(
            function=self._arguments.on_each(write_entries, PER_DATA_SHARD, PER_DATA_SHARD),
            arguments=(table, self._arguments.split(3, size)),
            results=by_data_shard(self._graph.mesh),
            donated=(0,),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run."""

    graph: ModelGraph
    params: Params
    programs: Programs
    caches: list[LayerCache]
