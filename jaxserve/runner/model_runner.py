"""Runs step plans on the device: `dispatch(plan)` returns at once, `PendingStep.result()` waits for the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from jaxserve.outputs import TokenLogprobs
from jaxserve.parallel.mesh import DATA, by_data_shard, to_devices
from jaxserve.runner.batch import BatchBuilder, HostStep, padded
from jaxserve.runner.drafts import DraftIds, DraftModel, Drafts, GivenDrafts
from jaxserve.runner.grammars import SlotGrammars
from jaxserve.runner.head_drafts import HeadDrafts
from jaxserve.runner.head_programs import LoadedHead
from jaxserve.runner.pending import PendingStep
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import LoadedModel
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import PROMPT_LOGPROB_ROWS, ForwardBatch, SampleBatch
from jaxserve.sampling.inputs import SlotParameters
from jaxserve.sampling.sampler import SampledTokens
from jaxserve.scheduler.plan import NewSlot, RowError, StepPlan, StepResult

NOT_FINITE = RowError(
    "the model's output for this sequence is not finite, so no token could be chosen", taints_blocks=True
)
RULED_OUT = RowError(
    "no token could be chosen: this request's penalties, logit_bias or forbidden tokens (structured_outputs and "
    "min_tokens forbid some, too) leave no finite logit",
    taints_blocks=False,
    is_by_request=True,
)


class Runner(Protocol):
    """What the engine core asks of whoever runs its plans."""

    def dispatch(self, plan: StepPlan) -> PendingStep: ...


class ModelRunner:
    """Owns the parameters, the KV pools, the token table and the block tables, and the host's memory of each slot."""

    def __init__(
        self,
        model: LoadedModel,
        shapes: ProgramShapes,
        *,
        drafting: LoadedModel | LoadedHead | None = None,
        grammars: SlotGrammars | None = None,
    ) -> None:
        """`drafting` draws the drafts that plans leave open; without it they name their drafts."""
        graph = model.graph
        self._params = model.params
        self._head = {name: model.params[name] for name in graph.head_names()}
        self._programs = model.programs
        self._caches = model.caches
        self._slots = SlotTable(
            max_num_seqs=shapes.max_num_seqs,
            max_blocks_per_seq=shapes.blocks_per_seq,
            num_data_shards=graph.mesh.shape[DATA],
        )
        num_slots = self._slots.num_data_shards * self._slots.slots_per_shard
        self._tokens, self._block_tables = (
            to_devices(np.zeros((num_slots, columns), np.int32), by_data_shard(graph.mesh))
            for columns in (shapes.max_model_len, shapes.blocks_per_seq)
        )
        self._parameters = SlotParameters(
            max_num_seqs=num_slots - 1,
            vocab_size=graph.config.vocab_size,
            sharding=by_data_shard(graph.mesh),
        )
        self._grammars = grammars or SlotGrammars()
        self._drafts = self._make_drafts(model, shapes, drafting)
        self._builder = BatchBuilder(shapes.buckets, self._slots, graph.backend)
        self._max_model_len, self._blocks_per_seq = shapes.max_model_len, shapes.blocks_per_seq

    def dispatch(self, plan: StepPlan) -> PendingStep:
        """Hand the step to the device and return; the tokens of earlier steps need not have arrived."""
        new_blocks = self._slots.apply(plan)
        for new in plan.new_slots:
            self._occupy(new)
        if new_blocks.size:
            self._block_tables = self._programs.write_blocks(self._block_tables, new_blocks)
        self._tokens, draft_ids = self._drafts.place(plan, self._tokens, self._block_tables)
        step = self._builder.build(plan)
        hidden, rows, features, self._caches = self._programs.forward(
            self._params,
            self._caches,
            self._tokens,
            self._block_tables,
            step.bucket,
            [ForwardBatch.from_host(batch) for batch in step.batches],
        )
        prompt_scores = self._score_prompts(hidden, plan, step)
        masks = self._grammars.masks(plan, step, draft_ids)
        variant, inputs = self._parameters.gather(*step.samples_of(plan), masks=masks)
        self._tokens, sampled = self._programs.sample(
            self._head, rows, self._tokens, [SampleBatch.from_host(batch) for batch in step.batches], inputs, variant
        )
        self._drafts.follow(plan, self._tokens, self._block_tables, hidden if features is None else features)
        pending = _DeviceStep(plan, step, draft_ids, sampled, prompt_scores, self._asked_logprobs(plan, step))
        return self._grammars.watch(plan, pending)

    def _make_drafts(
        self, model: LoadedModel, shapes: ProgramShapes, drafting: LoadedModel | LoadedHead | None
    ) -> Drafts:
        if drafting is None:
            return GivenDrafts(model.programs)
        if isinstance(drafting, LoadedHead):
            return HeadDrafts(drafting, shapes, slots=self._slots, parameters=self._parameters, masks=self._grammars)
        return DraftModel(drafting, shapes, slots=self._slots, parameters=self._parameters, masks=self._grammars)

    def _occupy(self, new: NewSlot) -> None:
        """Upload a new slot's tokens and blocks, and keep what its request asks of the sampler."""
        token_row = padded(new.token_ids, self._max_model_len)
        table_row = padded(new.block_ids, self._blocks_per_seq)
        self._tokens, self._block_tables = self._programs.write_slot(
            self._tokens, self._block_tables, new.slot, token_row, table_row
        )
        self._parameters.set(
            new.slot,
            new.sampling_params,
            stop_token_ids=new.stop_token_ids,
            num_prompt_tokens=new.num_prompt_tokens,
        )
        self._grammars.occupy(new)

    def _asked_logprobs(self, plan: StepPlan, step: HostStep) -> dict[int, int]:
        """Place of a sample -> alternatives asked for, where any were."""
        asked = self._slots.num_logprobs
        if not asked:
            return {}
        samples = zip(step.places.tolist(), step.sample_rows.tolist(), strict=True)
        return {place: asked[plan.slots[row]] for place, row in samples if plan.slots[row] in asked}

    def _score_prompts(self, hidden: jax.Array, plan: StepPlan, step: HostStep) -> list[_PromptScores]:
        """Log-probabilities of the prompt tokens that follow this step's positions, for rows that asked."""
        asked = self._slots.prompt_logprobs
        if not asked:
            return []
        scores = []
        for shard, batch in enumerate(step.batches):
            ends = np.cumsum(batch.num_tokens)
            for row, plan_row in enumerate(batch.order.tolist()):
                slot, start, count = plan.slots[plan_row], plan.starts[plan_row], plan.num_tokens[plan_row]
                known = min(count, int(self._slots.num_prompt_tokens[slot]) - 1 - start)  # positions with a successor
                if slot in asked and known > 0:
                    first = int(ends[row]) - count
                    parts = self._score_chunk(hidden, shard, first, asked[slot].token_ids[start + 1 :][:known])
                    scores.append(_PromptScores(plan_row, asked[slot].num_alternatives, parts))
        return scores

    def _score_chunk(
        self, hidden: jax.Array, shard: int, first: int, target_ids: np.ndarray
    ) -> list[tuple[range, SampledTokens]]:
        """Scores of the tokens that follow the positions from `first` on of a data shard's batch, part by part."""
        parts = []
        place = shard * PROMPT_LOGPROB_ROWS
        for begin in range(0, len(target_ids), PROMPT_LOGPROB_ROWS):
            targets = target_ids[begin : begin + PROMPT_LOGPROB_ROWS]
            rows = range(place, place + len(targets))
            indices, wanted = np.zeros((2, self._slots.num_data_shards * PROMPT_LOGPROB_ROWS), np.int32)
            indices[rows.start : rows.stop] = np.arange(first + begin, first + begin + len(targets))
            wanted[rows.start : rows.stop] = targets
            parts.append((rows, self._programs.score_prompt(self._head, hidden, indices, wanted)))
        return parts


@dataclass(slots=True)
class _PromptScores:
    """Scores of one row's prompt positions: (which of the scores are its own, the scores) a part."""

    plan_row: int
    num_logprobs: int
    parts: list[tuple[range, SampledTokens]]

    def fetch(self) -> list[TokenLogprobs]:
        return [
            entry
            for rows, scores in self.parts
            for entry in _token_logprobs(scores, dict.fromkeys(rows, self.num_logprobs)).values()
        ]


@dataclass(slots=True)
class _DeviceStep:
    """A dispatched step whose arrays are on their way to the host."""

    plan: StepPlan
    step: HostStep
    draft_ids: DraftIds
    sampled: SampledTokens
    prompt_scores: list[_PromptScores]
    asked_logprobs: dict[int, int]  # place of a sample -> alternatives

    def __post_init__(self) -> None:
        self.sampled.token_ids.copy_to_host_async()
        self.sampled.ok.copy_to_host_async()  # of the rest something is asked now and then

    def is_ready(self) -> bool:
        return self.sampled.token_ids.is_ready()

    def result(self) -> StepResult:
        token_ids = np.asarray(self.sampled.token_ids).tolist()
        ok = np.asarray(self.sampled.ok).tolist()
        logprobs = _token_logprobs(self.sampled, self.asked_logprobs) if self.asked_logprobs else {}
        drafts = self.draft_ids.fetch()
        result = StepResult(step_id=self.plan.step_id, token_ids=[[] for _ in range(self.plan.num_rows)])
        for place, row in zip(self.step.places.tolist(), self.step.sample_rows.tolist(), strict=True):
            new_ids = result.token_ids[row]
            if row in result.errors or (new_ids and new_ids[-1] != drafts[row][len(new_ids) - 1]):
                continue  # drawn behind a draft that did not hold
            if not ok[place]:
                model_ok = bool(np.asarray(self.sampled.model_ok)[place])
                result.errors[row] = RULED_OUT if model_ok else NOT_FINITE
                continue
            new_ids.append(token_ids[place])
            if place in logprobs:
                result.logprobs.setdefault(row, []).append(logprobs[place])
        for scores in self.prompt_scores:
            result.prompt_logprobs[scores.plan_row] = scores.fetch()
        return result


def _token_logprobs(scores: SampledTokens, asked: dict[int, int]) -> dict[int, TokenLogprobs]:
    """The rows that asked, each with as many alternatives as it asked for."""
    token_ids, logprobs, ranks = (np.asarray(a) for a in (scores.token_ids, scores.logprobs, scores.ranks))
    top_ids, top_logprobs = np.asarray(scores.top_token_ids), np.asarray(scores.top_logprobs)
    return {
        row: TokenLogprobs(
            token_id=int(token_ids[row]),
            logprob=float(logprobs[row]),
            rank=int(ranks[row]),
            top_token_ids=top_ids[row, :count].tolist(),
            top_logprobs=top_logprobs[row, :count].tolist(),
        )
        for row, count in asked.items()
    }
