"""The engine's greedy tokens with one attention path against those with another, on the same random weights.

Paths differ in rounding, so that sooner or later two tokens of nearly the same probability change places, and from
there on the answers have nothing in common. So answers are compared up to the first difference, which must be such a
tie: the baseline's own logarithms of the two probabilities, at that place, must lie close by each other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
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


def works(sizes: Sizes) -> list[str]:
    """The two models."""
    return ["tiny", "8b-shaped"]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Nothing to prepare: engines compile what they need."""
    models = {"tiny": TINY | sizes.tokens_model if sizes.name == "toy" else TINY, "8b-shaped": sizes.tokens_model}
    return lambda name: _compare(models[name], sizes)


def _compare(model: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        tested, baseline = (
            _answers(_config(folder, sizes, implementation), model, sizes)
            for implementation in (sizes.implementation, sizes.baseline)
        )
    return {"layers": model["num_hidden_layers"]} | compared(tested, baseline)


def _config(folder: str, sizes: Sizes, implementation: Implementation) -> Config:
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
            "token_buckets": (16, _BUDGET),
            "num_gpu_blocks_override": blocks,
        }
    )


def _prompt_lens(sizes: Sizes) -> list[int]:
    return [length for length in _PROMPTS if length <= sizes.longest_prompt]


def _answers(config: Config, model: dict[str, Any], sizes: Sizes) -> list[list[TokenDelta]]:
    core = EngineCore(config)
    try:
        prompts = [
            [3 + (index * 7919 + position * 104729) % (model["vocab_size"] - 3) for position in range(length)]
            for index, length in enumerate(_prompt_lens(sizes))
        ]
        return run(core, prompts, greedy(sizes.greedy_tokens, logprobs=_ALTERNATIVES))
    finally:
        core.shutdown()


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
