"""`ScheduledRequest`: a request with what the scheduler derives from it once, so that no step has to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypeAlias

from jaxserve.outputs import FinishReason, TokenDelta, TokenLogprobs
from jaxserve.request import EngineRequest, Request
from jaxserve.scheduler.plan import RowError

Rank: TypeAlias = tuple[float, ...]  # who runs first: the lower one; no two requests have the same

NEVER = sys.maxsize  # tokens


@dataclass(slots=True, eq=False, kw_only=True)
class ScheduledRequest(Request):
    """A `Request` in its scheduler's books.

    # token_ids     | prompt ........... | generated ........ | may be generated ...... |
    # stop tokens                        | ignored until min_total_tokens |              max_total_tokens
    """

    rank: Rank
    max_total_tokens: int  # ends with LENGTH at so many tokens: max_tokens, the context, or the whole KV pool
    min_total_tokens: int  # no stop token ends it before
    stop_tokens: dict[int, int | None]  # token that ends it -> what to report: None for EOS
    num_block_tokens: int = 0  # positions its block table has room for
    num_cacheable_tokens: int = NEVER  # with so many known tokens the next block can go into the prefix cache
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # collected so far, while they are owed
    owes_first_delta: bool = True

    @classmethod
    def of(cls, request: EngineRequest, *, rank: Rank, token_limit: int) -> ScheduledRequest:
        """The record of a request that came in; `token_limit` is the most tokens any sequence may have."""
        params = request.sampling_params
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = token_limit if params.max_tokens is None else params.max_tokens
        stop_tokens: dict[int, int | None] = {token_id: token_id for token_id in params.stop_token_ids or ()}
        if not params.ignore_eos:
            stop_tokens |= dict.fromkeys(request.eos_token_ids)
        return cls(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=params,
            eos_token_ids=frozenset(request.eos_token_ids),
            priority=request.priority,
            arrival_time_s=request.arrival_time_s,
            cache_salt=request.cache_salt,
            adapter=request.adapter,
            token_ids=list(request.prompt_token_ids),
            rank=rank,
            max_total_tokens=min(token_limit, num_prompt_tokens + max_tokens),
            min_total_tokens=num_prompt_tokens + params.min_tokens,
            stop_tokens=stop_tokens,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    def append(self, token_ids: list[int]) -> TokenDelta:
        """Add a step's new tokens, up to the one that ends the sequence; the list becomes the delta's.

        Where one does, the delta has a finish reason and the caller frees the request.
        """
        delta = TokenDelta(self.request_id, token_ids)
        if self.num_preemptions:
            delta.num_preemptions = self.num_preemptions
        if self.owes_first_delta:
            self.complete_first_delta(delta)
        known_ids = self.token_ids
        for count, token_id in enumerate(token_ids, 1):
            known_ids.append(token_id)
            if token_id in self.stop_tokens and len(known_ids) >= self.min_total_tokens:
                delta.finish_reason = FinishReason.STOP
                delta.stop_token_id = self.stop_tokens[token_id]
            elif len(known_ids) >= self.max_total_tokens:
                delta.finish_reason = FinishReason.LENGTH
            else:
                continue
            del token_ids[count:]
            break
        return delta

    def collect_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Add what a row that started at position `start` says of the tokens from start + 1 on.

        A row that is computed again after a preemption repeats what is known already; the first word counts.
        """
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += entries[len(self.prompt_logprobs) - (start + 1) :]

    def complete_first_delta(self, delta: TokenDelta) -> None:
        """Put in what is told once, with the first token."""
        self.owes_first_delta = False
        delta.num_cached_tokens = self.num_cached_tokens
        if self.first_scheduled_time_s is not None:
            delta.queued_s = max(0.0, self.first_scheduled_time_s - self.arrival_time_s)
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) == len(self.prompt_token_ids):
            delta.prompt_logprobs = self.prompt_logprobs
        self.prompt_logprobs = None

    def final_delta(self, reason: FinishReason, error: RowError | None = None) -> TokenDelta:
        """The delta of a request that ends without a token."""
        delta = TokenDelta(self.request_id, finish_reason=reason, num_preemptions=self.num_preemptions)
        if error is not None:
            delta.error, delta.is_error_by_request = error.message, error.is_by_request
        if self.owes_first_delta:
            self.complete_first_delta(delta)
        return delta
