"""A request on the wire (`EngineRequest`) and a request in the scheduler's hands (`Request`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxserve.outputs import FinishReason
from jaxserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate, as the engine receives it: tokens only, no text, `n` already spread out."""

    request_id: str  # unique in the engine
    prompt_token_ids: list[int]
    sampling_params: SamplingParams  # n == 1, seed set, bad words as tokens
    eos_token_ids: list[int] = field(default_factory=list)  # end the sequence unless ignore_eos
    priority: int = 0  # lower runs first, under the `priority` policy
    arrival_time_s: float = 0.0  # time.monotonic() at the server's door; comparable across processes of a host
    cache_salt: str | None = None  # requests share cached blocks only with the same salt
    adapter: str | None = None


class RequestStatus(Enum):
    """Where a request stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, with its generated tokens kept
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A sequence being generated. Owned and written by the scheduler alone.

    # token_ids            | prompt .......... | generated ..... |
    # num_computed_tokens  | K/V written or dispatched, without drafts ..... |
    # num_in_flight        tokens sampled on the device that the host has not seen yet, 2 at most; drafts do not count
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int]
    priority: int
    arrival_time_s: float
    cache_salt: str | None
    adapter: str | None
    token_ids: list[int]  # prompt and generated tokens the host knows
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    slot: int = 0  # row in the runner's per-request state; 0 is nobody's
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # one a full block of token_ids
    first_scheduled_time_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight included."""
        return self.num_tokens - len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
