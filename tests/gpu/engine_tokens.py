"""The engine's greedy tokens with one attention path against those with another, on the same random weights.

Paths differ in rounding, so that sooner or later two tokens of nearly the same probability change places, and from
there on the answers have nothing in common. So answers are compared up to the first difference, which must be such a
tie: the baseline's own logarithms of the two probabilities, at that place, must lie close by each other.

A model that drafts for itself says the same as without drafts, and nearly all that it guesses is right: how much must
be, and why not all, says `judging.HELD_SHARE`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jaxserve.config import Config, config_from_values
from jaxserve.engine.core import EngineCore
from jaxserve.outputs import TokenDelta, TokenLogprobs
from pallas_kernels.dispatch import Implementation
from tests.gpu.sizes import TINY, Sizes
from tests.harness import greedy, run, tokens

_ALTERNATIVES = 20
_TIE = 0.1  # of the distance from the most likely token to the least likely of the alternatives
_PROMPTS = (1, 15, 16, 17, 33, 64, 65, 100, 129, 200, 300, 700)  # tokens
_BUDGET = 256  # tokens a step: the long prompts come in chunks, beside decodes
_BUCKETS = (16, 64, _BUDGET)  # decodes; tails of prompts, and rows of drafts; chunks
_DRAFTS = 3  # a row
_SELF_DRAFTING = "self-drafting"


def works(sizes: Sizes) -> list[str]:
    """The two models, and the smaller one with itself as its draft model."""
    return ["tiny", "8b-shaped", _SELF_DRAFTING]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Nothing to prepare: engines compile what they need."""
    tiny = TINY | sizes.tokens_model if sizes.name == "toy" else TINY
    models = {"tiny": tiny, "8b-shaped": sizes.tokens_model}

    @cache
    def baseline(name: str) -> list[list[TokenDelta]]:
        return _answers(models[name], sizes, sizes.baseline)[0]

    def compare(name: str) -> dict[str, Any]:
        model = "tiny" if name == _SELF_DRAFTING else name
        tested, drafts = _answers(models[model], sizes, sizes.implementation, drafts=name == _SELF_DRAFTING)
        return {"layers": models[model]["num_hidden_layers"]} | drafts | compared(tested, baseline(model))

    return compare


def _config(folder: str, sizes: Sizes, implementation: Implementation, *, drafts: bool) -> Config:
    longest = max(_prompt_lens(sizes)) + sizes.greedy_tokens
    blocks = len(_prompt_lens(sizes)) * -(-longest // sizes.block_size) + 1
    return config_from_values(
        {
            "model": folder,
            "load_format": "dummy",
            "dtype": sizes.dtype,
            "device": sizes.device,
            "attention_backend": implementation,
            "block_size": sizes.block_size,
            "max_model_len": longest,
            "max_num_seqs": 16,
            "max_num_batched_tokens": _BUDGET,
            "token_buckets": _BUCKETS,
            "num_gpu_blocks_override": blocks,
            "speculative_config": {"model": folder, "num_speculative_tokens": _DRAFTS, "adaptive": False}
            if drafts
            else None,
        }
    )


def _prompt_lens(sizes: Sizes) -> list[int]:
    return [length for length in _PROMPTS if length <= sizes.longest_prompt]


def _answers(
    model: dict[str, Any], sizes: Sizes, implementation: Implementation, *, drafts: bool = False
) -> tuple[list[list[TokenDelta]], dict[str, int]]:
    """What the engine says, and how many drafts it made and held; RuntimeError where it was to draft and did not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        core = EngineCore(_config(folder, sizes, implementation, drafts=drafts))
    try:
        prompts = [
            [3 + (index * 7919 + position * 104729) % (model["vocab_size"] - 3) for position in range(length)]
            for index, length in enumerate(_prompt_lens(sizes))
        ]
        answers = run(core, prompts, greedy(sizes.greedy_tokens, logprobs=_ALTERNATIVES))
        counts = core.stats().drafts
    finally:
        core.shutdown()
    if not drafts:
        return answers, {}
    if not counts.num_draft_tokens:
        raise RuntimeError("nothing was drafted")
    return answers, {"drafts": counts.num_draft_tokens, "held": counts.num_accepted_tokens}


def compared(tested: Sequence[list[TokenDelta]], baseline: Sequence[list[TokenDelta]]) -> dict[str, Any]:
    """How many requests and tokens are equal, and how far from a tie the worst first difference is: 1 is the limit."""
    worst, equal_requests, equal_tokens = 0.0, 0, 0
    for got, wanted in zip(tested, baseline, strict=True):
        pairs = list(zip(tokens(got), tokens(wanted), strict=True))
        same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal_tokens += same
        equal_requests += same == len(pairs)
        if same < len(pairs):
            worst = max(worst, _distance_from_tie(pairs[same][0], _logprobs(wanted)[same]))
    return {
        "requests": len(baseline),
        "equal_requests": equal_requests,
        "tokens": sum(len(tokens(wanted)) for wanted in baseline),
        "equal_tokens": equal_tokens,  # before the first difference
        "of_allowed": worst,
    }


def _distance_from_tie(token: int, logprobs: TokenLogprobs) -> float:
    """Of the allowed gap; infinite for a token that is not among the alternatives."""
    if token not in logprobs.top_token_ids:
        return float("inf")
    gap = logprobs.logprob - logprobs.top_logprobs[logprobs.top_token_ids.index(token)]
    spread = logprobs.top_logprobs[0] - logprobs.top_logprobs[-1]
    return abs(gap) / (_TIE * spread) if spread else 0.0


def _logprobs(deltas: list[TokenDelta]) -> list[TokenLogprobs]:
    return [entry for delta in deltas for entry in delta.logprobs or ()]
