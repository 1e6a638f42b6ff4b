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
    """Persistent per-slot arrays; a step gathers the rows it needs. Block 0 is padding, and each data shard's slot 0.

    # slot    0       | 1 .. max_num_seqs | max_num_seqs + 1 | ...
    #         padding | data shard 0      | padding          | data shard 1 ...
    """

    def __init__(self, *, max_num_seqs: int, max_blocks_per_seq: int, num_data_shards: int = 1) -> None:
        """`max_num_seqs` is that of a data shard."""
        self.slots_per_shard = max_num_seqs + 1
        self.num_data_shards = num_data_shards
        num_slots = self.slots_per_shard * num_data_shards
        self.block_tables = np.zeros((num_slots, max_blocks_per_seq), np.int32)  # 0 past a sequence's end
        self._num_blocks = [0] * num_slots
        self.num_prompt_tokens = np.zeros(num_slots, np.int32)
        self.num_logprobs: dict[int, int] = {}  # slot -> alternatives a generated token, where asked
        self.prompt_logprobs: dict[int, PromptLogprobs] = {}  # where asked

    def apply(self, plan: StepPlan) -> np.ndarray:
        """Take in the plan's new slots, then its new blocks; returns the latter, i32[3, blocks]: slot, column, id."""
        for new in plan.new_slots:
            self._occupy(new)
        places = []
        for slot, block_ids in plan.new_blocks:
            first = self._num_blocks[slot]
            self._num_blocks[slot] = first + len(block_ids)
            places += [(slot, column, block_id) for column, block_id in enumerate(block_ids, first)]
        slots, columns, ids = blocks = np.array(places, np.int32).reshape(-1, 3).T
        self.block_tables[slots, columns] = ids
        return blocks

    def _occupy(self, new: NewSlot) -> None:
        count = len(new.block_ids)
        self.block_tables[new.slot, :count] = new.block_ids
        self.block_tables[new.slot, count:] = 0
        self._num_blocks[new.slot] = count
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
        self.num_logprobs.pop(new.slot, None)
        self.prompt_logprobs.pop(new.slot, None)
        params = new.sampling_params
        if params.logprobs is not None:
            self.num_logprobs[new.slot] = params.logprobs
        if params.prompt_logprobs is not None:
            prompt = np.array(new.token_ids[: new.num_prompt_tokens], np.int32)
            self.prompt_logprobs[new.slot] = PromptLogprobs(params.prompt_logprobs, prompt)
