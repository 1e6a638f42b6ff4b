"""What a step is to do and what came of it: plain data that crosses threads, processes and hosts."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.outputs import TokenLogprobs
from jaxserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSlot:
    """A request takes a slot of the runner: it was admitted, or resumed after preemption."""

    slot: int  # 1 .. max_num_seqs; 0 is reserved for padding
    request_id: str
    token_ids: list[int]  # prompt, and what was generated before a preemption
    num_prompt_tokens: int
    sampling_params: SamplingParams
    stop_token_ids: list[int]  # EOS (unless ignore_eos) and stop_token_ids: what min_tokens masks
    block_ids: list[int]  # the block table so far, prefix-cached blocks first


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """The rows of one step, as parallel lists (row i of each); nothing in it refers to the scheduler's own state.

    # request's tokens  0 ........ starts[i] | ... num_tokens[i] .................. | not yet
    #                   computed             | known, or in flight | drafts.get(i)  |
    # yields a token                                             * | *   *   *      |
    """

    step_id: int
    new_slots: list[NewSlot] = field(default_factory=list)  # applied before the rows
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)  # (slot, block ids to append)
    request_ids: list[str] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # tokens computed before this step
    num_tokens: list[int] = field(default_factory=list)  # tokens to compute in this step, at least 1
    samples: list[bool] = field(default_factory=list)  # whether the row reaches its end, and yields new tokens
    # row that samples -> its last tokens, which are guesses; zeros where the runner is to guess
    drafts: dict[int, list[int]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def total_num_tokens(self) -> int:
        return sum(self.num_tokens)


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row's sequence must end."""

    message: str
    taints_blocks: bool  # whether what it wrote into its KV blocks is not to be trusted
    is_by_request: bool = False  # its request asks for what cannot be


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a step produced, row for row of its plan."""

    step_id: int
    duration_s: float | None = None  # from the result before it, or from its plan, to this result
    token_ids: list[list[int]]  # a row's new tokens: the drafts that held and one more; none where it did not sample
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # row -> one a new token, where asked
    # row -> one entry a prompt token whose *successor* is known in this chunk: entry j is about the token at
    # position starts[row] + j + 1, as far as that is still a prompt token.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, RowError] = field(default_factory=dict)  # row -> why its sequence must end after these tokens
