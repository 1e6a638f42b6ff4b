"""The golden law on real weights: SmolLM2-135M in float32, against transformers, in every way a request can be run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from jaxserve.engine.core import EngineCore
from jaxserve.tokenizer.tokenizer import Tokenizer
from tests.checkpoints import SMOLLM2, smollm2_logprobs
from tests.harness import greedy, run, tiny_config, tokens
from tests.speculative.heads import EAGLE3_CONFIG, save_eagle3
from tests.speculative.reference_heads import Eagle3Reference

NUM_TOKENS = 40
COMMON = "You are a careful assistant. Answer in one short sentence, and say so when you do not know. "
TEXTS = [
    "The capital of France is",
    "1, 2, 3, 4,",
    "def fibonacci(n):\n",
    COMMON + "Why is the sky blue?",
    COMMON + "How many legs has a spider?",
    "Once upon a time there was a lighthouse keeper who wrote a letter every evening, and",
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_source(SMOLLM2)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    """A pool of 11 blocks of 16 tokens: room for any request alone, far too little for all at once."""
    changes = {"max_model_len": 128, "num_gpu_blocks_override": 12, "token_buckets": (8, 64)}
    core = EngineCore(tiny_config(SMOLLM2, **changes))
    yield core
    core.shutdown()


@pytest.fixture(scope="module")
def alone(core: EngineCore, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Our greedy tokens and their log-probabilities, one prompt at a time."""
    answers = []
    for index, prompt in enumerate(prompts):
        (deltas,) = run(core, [prompt], greedy(NUM_TOKENS, logprobs=0), cache_salt=f"alone {index}")
        answers.append((tokens(deltas), [entry.logprob for delta in deltas for entry in delta.logprobs or ()]))
    return answers


@pytest.fixture(scope="module")
def reference(prompts, alone) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens and their log-probabilities.

    One pass over a prompt and our answer: as long as the best token at each place is that of the answer, it is what
    greedy decoding would have gone on from.
    """
    answers = []
    for prompt, (answer, _) in zip(prompts, alone, strict=True):
        scores = smollm2_logprobs(prompt + answer)[len(prompt) - 1 : -1]
        answers.append((scores.argmax(-1).tolist(), scores.max(-1).tolist()))
    return answers


def test_alone_the_tokens_and_logprobs_are_those_of_transformers(alone, reference) -> None:
    for (given, given_logprobs), (wanted, logprobs) in zip(alone, reference, strict=True):
        assert given == wanted
        np.testing.assert_allclose(given_logprobs, logprobs, atol=1e-3)


def test_batched_chunked_and_preempted_the_tokens_are_the_same(core, prompts, reference) -> None:
    before = core.stats().num_preemptions
    deltas = run(core, prompts * 2, greedy(NUM_TOKENS), cache_salt="batched")
    assert [tokens(each) for each in deltas] == [wanted for wanted, _ in reference] * 2
    assert core.stats().num_preemptions > before


def test_prefix_cached_the_tokens_are_the_same(core, prompts, reference) -> None:
    hits = core.stats().prefix_hit_tokens
    for _ in range(2):
        given = [tokens(run(core, [prompt], greedy(NUM_TOKENS), cache_salt="again")[0]) for prompt in prompts[3:5]]
        assert given == [wanted for wanted, _ in reference[3:5]]
    assert core.stats().prefix_hit_tokens > hits


def test_with_drafts_batched_chunked_and_preempted_the_tokens_are_the_same(prompts, reference) -> None:
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 5,
        "adaptive": False,
    }
    changes = {"max_model_len": 128, "num_gpu_blocks_override": 12, "token_buckets": (8, 64)}
    core = EngineCore(tiny_config(SMOLLM2, speculative_config=speculative, **changes))
    for each in (prompts * 2, prompts[:2]):
        deltas = run(core, each, greedy(NUM_TOKENS))
        assert [tokens(one) for one in deltas] == ([wanted for wanted, _ in reference] * 2)[: len(each)]
    stats = core.stats()
    assert stats.drafts.num_accepted_tokens > 10
    assert stats.num_preemptions > 0
    assert (stats.num_compiles_after_ready, stats.kv_cache_usage) == (0, 0)
    core.shutdown()


def test_with_itself_as_its_draft_model_the_tokens_are_the_same_and_all_drafts_hold(prompts, reference) -> None:
    speculative = {"model": SMOLLM2, "num_speculative_tokens": 4, "adaptive": False}
    changes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "token_buckets": (16,), "max_model_len": 64}
    core = EngineCore(tiny_config(SMOLLM2, speculative_config=speculative, num_gpu_blocks_override=16, **changes))
    deltas = run(core, prompts[:3], greedy(12))
    assert [tokens(one) for one in deltas] == [wanted[:12] for wanted, _ in reference[:3]]
    stats = core.stats()
    assert stats.drafts.num_draft_tokens == stats.drafts.num_accepted_tokens > 15
    assert stats.num_compiles_after_ready == 0
    core.shutdown()


def test_with_an_eagle3_head_that_knows_nothing_the_tokens_are_the_same(prompts, reference, tmp_path) -> None:
    wanted = [answer[:12] for answer, _ in reference[:3]]
    token_ids = torch.tensor(sorted({token_id for answer in wanted for token_id in answer}))
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    changes = sizes | {"draft_vocab_size": len(token_ids)}
    torch.manual_seed(0)
    head = Eagle3Reference(EAGLE3_CONFIG | changes, torch.empty(0), token_ids)
    folder = save_eagle3(head, tmp_path / "head", **changes)
    speculative = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3, "adaptive": False}
    changes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "token_buckets": (16,), "max_model_len": 64}
    core = EngineCore(tiny_config(SMOLLM2, speculative_config=speculative, num_gpu_blocks_override=6, **changes))
    assert [tokens(one) for one in run(core, prompts[:3], greedy(12))] == wanted
    stats = core.stats()
    assert stats.drafts.num_draft_tokens > 15
    assert stats.num_compiles_after_ready == 0
    core.shutdown()


def test_nothing_was_compiled_after_ready_and_no_block_is_lost(core) -> None:
    assert core.stats().num_compiles_after_ready == 0
    assert core.stats().kv_cache_usage == 0
