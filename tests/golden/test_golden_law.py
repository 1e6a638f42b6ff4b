"""The golden law: a request's greedy tokens are the same however it is run. Float32 on CPU, where it is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine import drafting
from jaxserve.engine.core import EngineCore
from tests.checkpoints import save_random_llama, transformers_greedy
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.speculative.oracle import Oracle
from tests.structured.requests import CONSTRAINTS, constrained, masked_greedy

NUM_TOKENS = 24
_rng = np.random.default_rng(7)
_shared = _rng.integers(3, 320, 40).tolist()
PROMPTS = [_rng.integers(3, 320, size).tolist() for size in (1, 5, 16, 17, 33, 70)]
PROMPTS += [_shared + _rng.integers(3, 320, size).tolist() for size in (1, 9)]
GRAMMARS = [CONSTRAINTS[name] for name in ("json", "regex", "choice", "grammar", "json")]  # of as many more requests
PARAMS = [greedy(NUM_TOKENS) for _ in PROMPTS] + [constrained(greedy(NUM_TOKENS), grammar) for grammar in GRAMMARS]
PLAIN = len(PROMPTS)
PROMPTS += [_rng.integers(3, 320, size).tolist() for size in (3, 17, 33, 8)] + [[*_shared, 7]]


@dataclass(frozen=True)
class Way:
    """One way to run the same requests."""

    one_by_one: bool = False
    repeat: bool = False  # run them twice in one engine: the second time the prompts are cached
    config: dict = field(default_factory=dict)
    must_preempt: bool = False
    must_hit_cache: bool = False
    told: bool = False  # guesses come from who knows the answers, and are wrong now and then


# Drafts wherever there is room, whether it pays or not.
SPECULATIVE = {
    "speculative_config": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 5, "adaptive": False}
}

WAYS = {
    "alone": Way(one_by_one=True, config={"enable_prefix_caching": False}),
    "batched": Way(config={"enable_prefix_caching": False}),
    "synchronous": Way(config={"enable_prefix_caching": False, "async_scheduling": False}),
    "chunked": Way(config={"max_num_batched_tokens": 8, "token_buckets": (8,), "enable_prefix_caching": False}),
    "chunked by threshold": Way(config={"long_prefill_token_threshold": 7}),
    "prefix-cached": Way(repeat=True, must_hit_cache=True),
    "preempted": Way(config={"num_gpu_blocks_override": 9}, must_preempt=True),
    "preempted, synchronous": Way(
        config={"num_gpu_blocks_override": 9, "async_scheduling": False, "enable_prefix_caching": False},
        must_preempt=True,
    ),
    "by priority": Way(config={"scheduling_policy": "priority"}),
    "speculative, ngram": Way(config=SPECULATIVE),
    "speculative, adaptive": Way(
        config={"speculative_config": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 5}}
    ),
    "speculative": Way(config=SPECULATIVE, told=True),
    "speculative, synchronous": Way(config=SPECULATIVE | {"async_scheduling": False}, told=True),
    "speculative, chunked": Way(
        config=SPECULATIVE  # with few enough rows that a chunk has room for drafts of every one of them
        | {"max_num_batched_tokens": 12, "token_buckets": (12,), "max_num_seqs": 3, "enable_prefix_caching": False},
        told=True,
    ),
    "speculative, prefix-cached": Way(config=SPECULATIVE, told=True, repeat=True, must_hit_cache=True),
    "speculative, preempted": Way(config=SPECULATIVE | {"num_gpu_blocks_override": 9}, told=True, must_preempt=True),
    "speculative, two devices": Way(config=SPECULATIVE | {"tensor_parallel_size": 2}, told=True),
    "attention in XLA": Way(config={"attention_backend": "xla"}),
    "large blocks": Way(config={"block_size": 64, "num_gpu_blocks_override": 17}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(save_random_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[list[int]]:
    plain = transformers_greedy(checkpoint, PROMPTS[:PLAIN], NUM_TOKENS)
    return plain + masked_greedy(checkpoint, PROMPTS[PLAIN:], GRAMMARS, NUM_TOKENS)


@pytest.fixture
def core(
    checkpoint: Path, wanted: list[list[int]], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EngineCore]:
    if request.param.told:
        oracle = Oracle([prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)], vocab_size=320)
        monkeypatch.setattr(drafting, "NgramProposer", lambda **settings: oracle)
    core = EngineCore(tiny_config(str(checkpoint), **request.param.config))
    yield core
    core.shutdown()


@pytest.mark.parametrize(("core", "way"), [(way, way) for way in WAYS.values()], ids=WAYS.keys(), indirect=["core"])
def test_greedy_tokens_are_those_of_transformers(core: EngineCore, way: Way, wanted: list[list[int]]) -> None:
    given: list[list[int]] = []
    for _ in range(2 if way.repeat else 1):
        if way.one_by_one:
            given = [tokens(run(core, [prompt], params)[0]) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        else:
            given = [tokens(deltas) for deltas in run(core, PROMPTS, PARAMS)]
        assert given == wanted
    stats = core.stats()
    assert stats.num_preemptions > 0 or not way.must_preempt
    assert stats.prefix_hit_tokens > 0 or not way.must_hit_cache
    assert 0 < stats.drafts.num_accepted_tokens < stats.drafts.num_draft_tokens or not way.told
    assert stats.num_compiles_after_ready == 0
    assert stats.kv_cache_usage == 0
