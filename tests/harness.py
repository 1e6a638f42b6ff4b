"""Drives an `EngineCore` in this process to the end of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve.config import Config, config_from_values
from jaxserve.engine.core import EngineCore
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import SamplingParams


def tiny_config(model: str, **changes: Any) -> Config:
    """A float32 launch config on CPU with a pool small enough to reason about."""
    values: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "token_buckets": (8, 64),
        "block_size": 16,
        "num_gpu_blocks_override": 65,
    }
    return config_from_values(values | changes)


def greedy(num_tokens: int, **changes: Any) -> SamplingParams:
    """Greedy parameters for exactly `num_tokens` tokens."""
    return SamplingParams(**({"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True} | changes))


def run(
    core: EngineCore, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams], **fields: Any
) -> list[list[TokenDelta]]:
    """Add all prompts at once, step to the end, and give each request's deltas."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    deltas: dict[str, list[TokenDelta]] = {f"r{i}": [] for i in range(len(prompts))}
    for i, (prompt, sampling) in enumerate(zip(prompts, each, strict=True)):
        request = EngineRequest(
            request_id=f"r{i}", prompt_token_ids=prompt, sampling_params=sampling, eos_token_ids=[2], **fields
        )
        core.add_request(request)
    while core.has_unfinished:
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    return list(deltas.values())


def tokens(deltas: list[TokenDelta]) -> list[int]:
    """All tokens of a request's deltas."""
    return [token for delta in deltas for token in delta.token_ids]
