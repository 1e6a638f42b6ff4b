"""`SchedulerSettings`: the limits a scheduler works under, and `SchedulerStats`: where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypeAlias

from jaxserve.errors import ConfigError

Policy: TypeAlias = Literal["fcfs", "priority"]
POLICIES: tuple[Policy, ...] = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits and order. Raises `ConfigError` where they cannot be met together."""

    max_num_seqs: int = 256  # requests running at once: rows of a step, slots of the runner
    first_slot: int = 1  # of its max_num_seqs slots
    max_num_batched_tokens: int = 2048  # the token budget of a step
    max_num_drafts: int = 0  # guessed tokens a step, over all requests
    max_model_len: int  # tokens, prompt and answer together
    policy: Policy = "fcfs"  # "priority": lower `priority` first, then arrival
    max_queued_requests: int  # waiting requests beyond which new ones are refused
    long_prefill_token_threshold: int = 0  # most tokens a step takes of one request; 0: as many as the budget allows

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scheduler.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("long_prefill_token_threshold", "max_num_drafts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"scheduler.{name} must be 0 (off) or more, got {getattr(self, name)}")
        if self.policy not in POLICIES:
            raise ConfigError(f"scheduler.policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"scheduler.max_num_batched_tokens ({self.max_num_batched_tokens}) must not be less than max_num_seqs "
                f"({self.max_num_seqs}): each running request takes a token of every step; raise the first or lower "
                f"the second"
            )

    @property
    def max_num_samples(self) -> int:
        """Most places of a step at which a token is sampled: one a request, and one a draft."""
        return self.max_num_seqs + self.max_num_drafts

    @property
    def max_tokens_per_row(self) -> int:
        """Most tokens a step takes of one request."""
        return min(self.long_prefill_token_threshold or self.max_num_batched_tokens, self.max_num_batched_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """Counters of guessed tokens, from 0 at the start."""

    num_drafts: int = 0  # rows that had some
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # drafts that held
    accepted_per_position: tuple[int, ...] = ()  # of a row's first draft, its second ...

    @classmethod
    def total(cls, counts: Sequence[DraftCounts]) -> DraftCounts:
        """Of several schedulers together.

        >>> DraftCounts.total([DraftCounts().plus(2, 1), DraftCounts().plus(1, 1)]).accepted_per_position
        (2, 0)
        """
        positions = zip_longest(*(count.accepted_per_position for count in counts), fillvalue=0)
        return cls(
            num_drafts=sum(count.num_drafts for count in counts),
            num_draft_tokens=sum(count.num_draft_tokens for count in counts),
            num_accepted_tokens=sum(count.num_accepted_tokens for count in counts),
            accepted_per_position=tuple(map(sum, positions)),
        )

    def plus(self, num_tokens: int, num_accepted: int) -> DraftCounts:
        """With a row of `num_tokens` drafts, the first `num_accepted` of which held.

        >>> DraftCounts().plus(4, 2).plus(1, 1).accepted_per_position
        (2, 1, 0, 0)
        """
        held = [1] * num_accepted + [0] * (num_tokens - num_accepted)
        return DraftCounts(
            num_drafts=self.num_drafts + 1,
            num_draft_tokens=self.num_draft_tokens + num_tokens,
            num_accepted_tokens=self.num_accepted_tokens + num_accepted,
            accepted_per_position=tuple(map(sum, zip_longest(self.accepted_per_position, held, fillvalue=0))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges of this moment, and counters that only grow, from 0 at the start."""

    num_running: int
    num_waiting: int  # preempted ones included
    kv_cache_usage: float  # fraction of blocks in use, 0 to 1
    prefix_queried_tokens: int  # counter: prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int  # counter: of those, found
    num_preemptions: int  # counter
    num_steps: int  # counter: plans made
    num_computed_tokens: int  # counter: tokens planned, recomputed ones and drafts included
    drafts: DraftCounts
