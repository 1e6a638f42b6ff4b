"""How a step's drafts get into the token table: `GivenDrafts`, that the plan names, or a `DraftModel`'s own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import jax
import numpy as np

from jaxserve.runner.batch import BatchBuilder, draft_places
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import LoadedModel, Programs
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import SlotParameters, TokenMasks
from jaxserve.scheduler.plan import StepPlan


class DraftIds(Protocol):
    """A step's drafts, which may still be on their way to the host."""

    def fetch(self) -> dict[int, list[int]]:
        """Row of the plan -> its drafts."""
        ...


class DraftMasks(Protocol):
    """Keeps the drafts that are drawn to what their requests may say."""

    def draft_masks(self, plan: StepPlan, places: Mapping[int, int], drawn: DraftIds) -> TokenMasks | None:
        """See `SlotGrammars.draft_masks`."""
        ...


class Drafts(Protocol):
    """Puts drafts where the step's forward pass reads its inputs."""

    def place(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array) -> tuple[jax.Array, DraftIds]:
        """The token table with the plan's drafts in it; `tokens` is donated. Slots and blocks are up to date."""
        ...

    def follow(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array, features: jax.Array) -> None:
        """The model has computed the plan's rows, and their new tokens are in the table; `features` is what a draft
        head reads of the model, [tokens, features] in the order of the step's batches."""
        ...


@dataclass(frozen=True, slots=True)
class KnownIds:
    """Drafts that the host knows."""

    ids: dict[int, list[int]]

    def fetch(self) -> dict[int, list[int]]:
        return self.ids


class GivenDrafts:
    """Takes the drafts from the plan."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def place(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array) -> tuple[jax.Array, DraftIds]:
        if plan.drafts:
            tokens = self._programs.write_drafts(tokens, draft_places(plan))
        return tokens, KnownIds(plan.drafts)

    def follow(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array, features: jax.Array) -> None:
        """Nothing."""


@dataclass(slots=True)
class DrawnIds:
    """Drafts that a model draws, one a row and pass."""

    passes: list[tuple[dict[int, int], jax.Array]] = field(default_factory=list)  # plan row -> place in what was drawn

    def add(self, places: dict[int, int], token_ids: jax.Array) -> None:
        token_ids.copy_to_host_async()
        self.passes.append((places, token_ids))

    def fetch(self) -> dict[int, list[int]]:
        drafts: dict[int, list[int]] = {}
        for places, token_ids in self.passes:
            drawn = np.asarray(token_ids).tolist()
            for row, place in places.items():
                drafts.setdefault(row, []).append(drawn[place])
        return drafts


class DraftModel:
    """A smaller model that draws the drafts, with K and V of its own in pools of the same blocks.

    It computes whatever the large model does, so shared prefixes, chunks and resumed requests find its K and V as they
    find the large model's. A draft is drawn as its token will be, with the same parameters and random numbers: the two
    models agree more often than if each drew for itself. A grammar's mask is the one that the token will have.

    # tokens       ... t     | d1       d2       d3 | then, if all three held: t'
    # first pass   ... t ->  | d1
    # more passes            | d1 ->    d2 ->       |
    # not computed                               d3 | with t', by the next step
    """

    def __init__(
        self,
        model: LoadedModel,
        shapes: ProgramShapes,
        *,
        slots: SlotTable,
        parameters: SlotParameters,
        masks: DraftMasks,
    ) -> None:
        self._params = model.params
        self._head = {name: model.params[name] for name in model.graph.head_names()}
        self._programs = model.programs
        self._caches = model.caches
        self._parameters = parameters
        self._masks = masks
        self._builder = BatchBuilder(shapes.buckets, slots, model.graph.backend)
        self._max_tokens = shapes.buckets.token_sizes[-1]
        self._slots = slots
        self._num_computed = np.zeros(slots.num_data_shards * slots.slots_per_shard, np.int64)  # by slot
        self._block_size = shapes.kv_spec.block_size
        self._num_filled = np.zeros((slots.num_data_shards, shapes.num_blocks), np.int32)  # positions, by block

    def place(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array) -> tuple[jax.Array, DraftIds]:
        """Compute the plan's rows up to their drafts, and draw those one after the other."""
        self._take_over(plan)
        drawn = DrawnIds()
        for step in self._first_passes(plan):
            tokens = self._run(step, tokens, block_tables, drawn)
        most = max(map(len, plan.drafts.values()), default=0)
        for index in range(1, most):
            rows = [row for row, draft_ids in plan.drafts.items() if len(draft_ids) > index]
            ends = [plan.starts[row] + plan.num_tokens[row] - len(plan.drafts[row]) for row in rows]
            starts = [end + index - 1 for end in ends]
            step = _Pass(plan, rows, starts, [1] * len(rows), [True] * len(rows))
            tokens = self._run(step, tokens, block_tables, drawn)
        return tokens, drawn

    def follow(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array, features: jax.Array) -> None:
        """Nothing: it has gone ahead."""

    def _take_over(self, plan: StepPlan) -> None:
        """Nothing is in new blocks yet; what shared ones hold says where a new slot's computation begins."""
        for slot, block_ids in plan.new_blocks:
            self._num_filled[slot // self._slots.slots_per_shard, block_ids] = 0
        newcomers = {new.slot for new in plan.new_slots}
        for slot, start in zip(plan.slots, plan.starts, strict=True):
            if slot in newcomers:
                self._num_computed[slot] = self._occupy(slot, start)

    def _occupy(self, slot: int, num_shared: int) -> int:
        """How many of its first `num_shared` positions are filled: the last one is not where the sequence that left
        its blocks behind ended with a draft that held."""
        num_filled = self._num_filled[slot // self._slots.slots_per_shard]
        shared, own = np.split(self._slots.block_tables[slot], [num_shared // self._block_size])
        num_filled[own] = 0
        gaps = np.flatnonzero(num_filled[shared] < self._block_size)
        if not len(gaps):
            return num_shared
        return int(gaps[0]) * self._block_size + int(num_filled[shared[gaps[0]]])

    def _first_passes(self, plan: StepPlan) -> list[_Pass]:
        """All rows' tokens without drafts, and with the last draft of the step before where that held."""
        rows = list(range(plan.num_rows))
        counts = [len(plan.drafts.get(row, ())) for row in rows]
        ends = [plan.starts[row] + plan.num_tokens[row] - counts[row] for row in rows]
        starts = [min(plan.starts[row], int(self._num_computed[plan.slots[row]])) for row in rows]
        for row in rows:
            self._num_computed[plan.slots[row]] = ends[row] + max(counts[row] - 1, 0)
        samples = [count > 0 for count in counts]
        whole = _Pass(plan, rows, starts, [end - start for start, end in zip(starts, ends, strict=True)], samples)
        if sum(whole.num_tokens) <= self._max_tokens:
            return [whole]
        late = [row for row in rows if starts[row] < plan.starts[row]]
        owed = [plan.starts[row] - starts[row] for row in late]
        own = [ends[row] - plan.starts[row] for row in rows]
        return [
            _Pass(plan, late, [starts[row] for row in late], owed, [False] * len(late)),
            _Pass(plan, rows, plan.starts, own, samples),
        ]

    def _run(self, step: _Pass, tokens: jax.Array, block_tables: jax.Array, drawn: DrawnIds) -> jax.Array:
        """One pass of the model; where rows sample, a draft of each is drawn into the token table."""
        plan = step.as_plan()
        built = self._builder.build(plan)
        for num_filled, batch in zip(self._num_filled, built.batches, strict=True):
            num_filled[batch.kv_slots // self._block_size] = (
                batch.kv_slots % self._block_size + 1
            )  # the last one counts
        _, rows, _, self._caches = self._programs.forward(
            self._params,
            self._caches,
            tokens,
            block_tables,
            built.bucket,
            [ForwardBatch.from_host(batch) for batch in built.batches],
        )
        if not len(built.places):
            return tokens
        drawn_rows = [step.rows[index] for index in built.sample_rows.tolist()]
        places = dict(zip(drawn_rows, built.places.tolist(), strict=True))
        masks = self._masks.draft_masks(step.plan, places, drawn)
        variant, inputs = self._parameters.gather(*built.samples_of(plan), masks=masks)
        tokens, sampled = self._programs.sample(
            self._head, rows, tokens, [SampleBatch.from_host(batch) for batch in built.batches], inputs, variant
        )
        drawn.add(places, sampled.token_ids)
        return tokens


@dataclass(frozen=True, slots=True)
class _Pass:
    """Some rows of a plan, with other tokens."""

    plan: StepPlan
    rows: list[int]
    starts: list[int]
    num_tokens: list[int]
    samples: list[bool]

    def as_plan(self) -> StepPlan:
        return StepPlan(
            step_id=self.plan.step_id,
            request_ids=[self.plan.request_ids[row] for row in self.rows],
            slots=[self.plan.slots[row] for row in self.rows],
            starts=self.starts,
            num_tokens=self.num_tokens,
            samples=self.samples,
        )
