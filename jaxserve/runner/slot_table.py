"""What the host remembers of each slot between steps: block table, prompt length, whose it is. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.scheduler.plan import NewSlot, StepPlan


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """A slot whose prompt's own log-probabilities were asked for."""

    num_alternatives: int
    token_ids: np.ndarray  # i32[prompt tokens]


class SlotTable:
    """Persistent per-slot arrays; a step gathers the rows it needs. Slot 0 and block 0 are padding."""

    def __init__(self, *, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.block_tables = np.zeros((max_num_seqs + 1, max_blocks_per_seq), np.int32)  # 0 past a sequence's end
        self.num_blocks = np.zeros(max_num_seqs + 1, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs + 1, np.int32)
        self.num_logprobs: dict[int, int] = {}  # slot -> alternatives a generated token, where asked
        self.prompt_logprobs: dict[int, PromptLogprobs] = {}  # where asked

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new slots and new blocks."""
        for new in plan.new_slots:
            self._occupy(new)
        for slot, block_ids in plan.new_blocks:
            start = self.num_blocks[slot]
            self.block_tables[slot, start : start + len(block_ids)] = block_ids
            self.num_blocks[slot] = start + len(block_ids)

    def _occupy(self, new: NewSlot) -> None:
        count = len(new.block_ids)
        self.block_tables[new.slot, :count] = new.block_ids
        self.block_tables[new.slot, count:] = 0
        self.num_blocks[new.slot] = count
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
        self.num_logprobs.pop(new.slot, None)
        self.prompt_logprobs.pop(new.slot, None)
        params = new.sampling_params
        if params.logprobs is not None:
            self.num_logprobs[new.slot] = params.logprobs
        if params.prompt_logprobs is not None:
            prompt = np.array(new.token_ids[: new.num_prompt_tokens], np.int32)
            self.prompt_logprobs[new.slot] = PromptLogprobs(params.prompt_logprobs, prompt)
