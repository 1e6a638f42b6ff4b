"""`CoreInfo` and `EngineStats`: what an engine core says of itself, as plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.scheduler.settings import DraftCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreInfo:
    """What is fixed once the core is ready."""

    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int
    num_blocks: int  # blocks of the KV pool
    block_size: int  # token positions a block
    fingerprint: str  # identifies weights, settings and code
    eos_token_ids: list[int] = field(default_factory=list)  # of generation_config.json, beside the tokenizer's
    default_sampling: dict[str, float | int] = field(default_factory=dict)  # of generation_config.json
    startup_s: dict[str, float] = field(default_factory=dict)  # phase ("load", "compile", ...) -> seconds it took


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Where the core stands. Gauges are of this moment; counters only grow, from 0 at the core's start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # fraction of blocks in use, 0 to 1
    prefix_queried_tokens: int = 0  # counter: prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int = 0  # counter: of those, found
    num_preemptions: int = 0  # counter
    num_steps: int = 0  # counter
    num_computed_tokens: int = 0  # counter: tokens that steps computed, prompt and generated
    drafts: DraftCounts = DraftCounts()
    num_compiles_after_ready: int = 0  # counter; anything but 0 is a defect
