"""`SchedulerSettings`: the limits a scheduler works under, and `SchedulerStats`: where it stands."""

from __future__ import annotations

from dataclasses import dataclass
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
    max_model_len: int  # tokens, prompt and answer together
    policy: Policy = "fcfs"  # "priority": lower `priority` first, then arrival
    max_queued_requests: int  # waiting requests beyond which new ones are refused
    long_prefill_token_threshold: int = 0  # most tokens a step takes of one request; 0: as many as the budget allows

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scheduler.{name} must be at least 1, got {getattr(self, name)}")
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                f"scheduler.long_prefill_token_threshold must be 0 (off) or more, got "
                f"{self.long_prefill_token_threshold}"
            )
        if self.policy not in POLICIES:
            raise ConfigError(f"scheduler.policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"scheduler.max_num_batched_tokens ({self.max_num_batched_tokens}) must not be less than max_num_seqs "
                f"({self.max_num_seqs}): each running request takes a token of every step; raise the first or lower "
                f"the second"
            )

    @property
    def max_tokens_per_row(self) -> int:
        """Most tokens a step takes of one request."""
        return min(self.long_prefill_token_threshold or self.max_num_batched_tokens, self.max_num_batched_tokens)


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
    num_computed_tokens: int  # counter: tokens planned, recomputed ones included
