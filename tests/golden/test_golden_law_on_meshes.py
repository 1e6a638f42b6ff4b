"""The golden law on meshes: greedy tokens are the same however many devices share a layer, or share the requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.core import EngineCore
from tests.checkpoints import save_random_llama, transformers_greedy
from tests.harness import greedy, run, tiny_config, tokens

NUM_TOKENS = 16
KV_HEADS = (1, 2, 4, 8)
VOCAB_SIZE = 331  # a prime: no number of devices divides it
_rng = np.random.default_rng(11)
_shared = _rng.integers(3, VOCAB_SIZE, 35).tolist()
PROMPTS = [_rng.integers(3, VOCAB_SIZE, size).tolist() for size in (1, 5, 17, 70)]
PROMPTS += [_shared + _rng.integers(3, VOCAB_SIZE, size).tolist() for size in (1, 9)]

Checkpoints = dict[int, tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """KV heads -> a checkpoint with so many, and the tokens wanted of it."""
    found = {}
    for heads in KV_HEADS:
        folder = save_random_llama(
            tmp_path_factory.mktemp(f"kv-heads-{heads}"),
            num_key_value_heads=heads,
            num_hidden_layers=2,
            vocab_size=VOCAB_SIZE,
        )
        found[heads] = (folder, transformers_greedy(folder, PROMPTS, NUM_TOKENS))
    return found


ONE_BUCKET = {"max_num_batched_tokens": 32, "token_buckets": (32,)}  # fewer programs to compile, of each mesh
# Devices that share a layer, copies of the model, KV heads. Of each number of devices: several heads for each, one, one
# that some of them share, one that all share.
MESHES = [(1, 1, 1), (1, 1, 8), (2, 1, 4), (2, 1, 1), (4, 1, 8), (4, 1, 4), (8, 1, 8), (8, 1, 4), (8, 1, 1)]
MESHES += [(1, 2, 2), (2, 2, 2), (4, 2, 2), (2, 4, 8)]


@pytest.mark.parametrize(("tensor", "data", "kv_heads"), MESHES, ids=lambda size: str(size))
def test_greedy_tokens_are_those_of_transformers(checkpoints: Checkpoints, tensor: int, data: int, kv_heads: int):
    folder, wanted = checkpoints[kv_heads]
    core = EngineCore(tiny_config(str(folder), tensor_parallel_size=tensor, data_parallel_size=data, **ONE_BUCKET))
    given = [tokens(deltas) for deltas in run(core, PROMPTS, greedy(NUM_TOKENS))]
    assert given == wanted
    stats = core.stats()
    core.shutdown()
    assert stats.num_compiles_after_ready == 0
    assert stats.kv_cache_usage == 0


def test_requests_of_two_data_shards_are_chunked_cached_and_preempted_alike(checkpoints: Checkpoints):
    folder, wanted = checkpoints[2]
    changes = {"max_num_batched_tokens": 8, "token_buckets": (8,), "num_gpu_blocks_override": 8, "max_model_len": 96}
    core = EngineCore(tiny_config(str(folder), tensor_parallel_size=2, data_parallel_size=2, **changes))
    for _ in range(2):
        assert [tokens(deltas) for deltas in run(core, PROMPTS, greedy(NUM_TOKENS))] == wanted
    stats = core.stats()
    core.shutdown()
    assert stats.num_preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert stats.num_compiles_after_ready == 0


def test_a_seed_draws_the_same_tokens_and_logprobs_on_every_mesh(checkpoints: Checkpoints):
    folder, _ = checkpoints[2]
    sampled = [
        greedy(10, temperature=1.2, seed=5, logprobs=3),
        greedy(10, temperature=0.9, top_p=0.8, seed=6),
        greedy(10, temperature=2.0, top_k=100, seed=7, logprobs=2, prompt_logprobs=2),
        greedy(10, temperature=1.0, top_k=20, seed=8, repetition_penalty=1.3, presence_penalty=0.2),
        greedy(10, logit_bias={5: 3.0, 330: 2.0}, frequency_penalty=0.5),
        greedy(10, allowed_token_ids=[3, 130, 260, 330], temperature=1.0, seed=9),
    ]
    answers = []
    for tensor, data in ((1, 1), (4, 1), (4, 2)):
        core = EngineCore(tiny_config(str(folder), tensor_parallel_size=tensor, data_parallel_size=data, **ONE_BUCKET))
        answers.append(run(core, PROMPTS, sampled))
        core.shutdown()
    alone = answers[0]
    for other in answers[1:]:
        assert [tokens(deltas) for deltas in other] == [tokens(deltas) for deltas in alone]
        for given, wanted in zip(other, alone, strict=True):
            for a, b in zip(given, wanted, strict=True):
                for entries, others in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
                    assert (entries is None) == (others is None)
                    for x, y in zip(entries or (), others or (), strict=True):
                        assert (x is None) == (y is None)
                        if x is not None and y is not None:
                            assert (x.token_id, x.rank, x.top_token_ids) == (y.token_id, y.rank, y.top_token_ids)
                            np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-4)
