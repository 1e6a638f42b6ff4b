"""`HeadDrafts`: drafts that a head of the model draws from the model's own hidden states."""

from __future__ import annotations

from dataclasses import replace

import jax

from jaxserve.runner.batch import BatchBuilder, HostStep
from jaxserve.runner.drafts import DraftIds, DraftMasks, DrawnIds
from jaxserve.runner.head_programs import LoadedHead
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import SlotParameters
from jaxserve.scheduler.plan import StepPlan


class HeadDrafts:
    """Draws drafts from the head's states, and keeps the head up with the model.

    The head has K and V of its own in pools of the same blocks, and goes over whatever the model has computed in the
    same step. So shared prefixes, chunks and resumed requests find its K and V as they find the model's. At the last
    position of a shared block it has seen the next token of whoever wrote the block: a guess may be worse for it.

    # tokens                    ... t      | d1       d2       d3
    # state of the step before  ..  ->     | d1                       (drawn without a pass: it has read t)
    # passes of the head                   | d1 ->    d2 ->           (d2, d3)
    # the model                      t ->    d1 ->    d2 ->    d3 ->  (verified)
    # the head follows               t       d1       d2       d3
    """

    def __init__(
        self,
        head: LoadedHead,
        shapes: ProgramShapes,
        *,
        slots: SlotTable,
        parameters: SlotParameters,
        masks: DraftMasks,
    ) -> None:
        self._params = dict(head.params)
        self._logit_params = {name: head.params[name] for name in head.graph.head_names()}
        self._programs = head.programs
        self._caches = head.caches
        self._states = head.programs.new_states()
        self._parameters = parameters
        self._masks = masks
        self._builder = BatchBuilder(shapes.buckets, slots, head.graph.backend)

    def place(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array) -> tuple[jax.Array, DraftIds]:
        """Draw the plan's drafts one after the other, each row's from where the model stands."""
        drawn = DrawnIds()
        for index in range(max(map(len, plan.drafts.values()), default=0)):
            tokens = self._draw(plan, index, tokens, block_tables, drawn)
        return tokens, drawn

    def follow(self, plan: StepPlan, tokens: jax.Array, block_tables: jax.Array, features: jax.Array) -> None:
        """Go over what the model has computed."""
        step = self._builder.build(plan)
        self._states, self._caches = self._programs.follow(
            self._params,
            self._caches,
            self._states,
            tokens,
            block_tables,
            step.bucket,
            _forward_batches(step),
            features,
        )

    def _advance(self, step: HostStep, tokens: jax.Array, block_tables: jax.Array) -> None:
        """Compute the states from which these drafts are drawn."""
        self._states, self._caches = self._programs.advance(
            self._params, self._caches, self._states, tokens, block_tables, step.bucket, _forward_batches(step)
        )

    def _draw(
        self, plan: StepPlan, index: int, tokens: jax.Array, block_tables: jax.Array, drawn: DrawnIds
    ) -> jax.Array:
        """Each row's draft of that index, two tokens behind the position of its state."""
        rows = [row for row, draft_ids in plan.drafts.items() if len(draft_ids) > index]
        states = _states_of(plan, rows, index)
        step = self._builder.build(states)
        if index:
            self._advance(step, tokens, block_tables)
        places = {
            rows[index]: place for index, place in zip(step.sample_rows.tolist(), step.places.tolist(), strict=True)
        }
        slots, positions = step.samples_of(states)
        masks = self._masks.draft_masks(plan, places, drawn)
        variant, inputs = self._parameters.gather(slots, positions + 1, masks=masks)
        batches = [SampleBatch.from_host(batch) for batch in step.batches]
        batches = [replace(batch, positions=batch.positions + 1) for batch in batches]
        tokens, sampled = self._programs.draw(self._logit_params, self._states, tokens, batches, inputs, variant)
        drawn.add(places, sampled.token_ids)
        return tokens


def _states_of(plan: StepPlan, rows: list[int], index: int) -> StepPlan:
    """One token a row: the position whose state the draft of that index is drawn from."""
    ends = [plan.starts[row] + plan.num_tokens[row] - len(plan.drafts[row]) for row in rows]
    return StepPlan(
        step_id=plan.step_id,
        request_ids=[plan.request_ids[row] for row in rows],
        slots=[plan.slots[row] for row in rows],
        starts=[end - 2 + index for end in ends],
        num_tokens=[1] * len(rows),
        samples=[True] * len(rows),
    )


def _forward_batches(step: HostStep) -> list[ForwardBatch]:
    return [ForwardBatch.from_host(batch) for batch in step.batches]
