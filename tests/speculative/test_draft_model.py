"""A draft model with K and V of its own: never another answer, and no draft refused where it is the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.engine import assembly
from jaxserve.engine.core import EngineCore
from jaxserve.errors import ConfigError
from jaxserve.runner.memory import DeviceMemory
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.vocabulary import first_difference
from jaxserve.weights.source import resolve_source
from tests.checkpoints import save_random_llama
from tests.e2e.tiny_model import write_config, write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.structured.requests import CONSTRAINTS, constrained

NUM_TOKENS = 24
BLOCK_BYTES = 2 * 16 * 4 * 3 * 2 * 16  # of the model: K and V, positions, bytes, layers, heads, head_dim
_rng = np.random.default_rng(13)
_shared = _rng.integers(3, 320, 36).tolist()
PROMPTS = [_rng.integers(3, 320, size).tolist() for size in (1, 5, 33, 70)] + [[*_shared, 5], [*_shared, 6, 7]]
PARAMS = [
    greedy(NUM_TOKENS),
    greedy(NUM_TOKENS, frequency_penalty=0.4, logprobs=2),
    SamplingParams(seed=5, temperature=0.7, repetition_penalty=1.2, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(seed=6, top_p=0.8, presence_penalty=0.5, max_tokens=NUM_TOKENS - 5, ignore_eos=True),
    greedy(NUM_TOKENS - 3),
    SamplingParams(seed=7, top_k=30, min_p=0.05, max_tokens=NUM_TOKENS - 9, ignore_eos=True),
]

GRAMMARS = [
    constrained(PARAMS[1], CONSTRAINTS["json"]),
    constrained(PARAMS[2], CONSTRAINTS["regex"]),
    PARAMS[4],
    replace(PARAMS[3], structured_outputs_grammar=grammar_text(StructuredOutputsParams(regex="(.|\n)*"))),
    constrained(PARAMS[5], CONSTRAINTS["grammar"]),
    constrained(PARAMS[2], CONSTRAINTS["choice"]),  # ends within a step's drafts
]
REQUESTS = {"plain": PARAMS, "grammars": GRAMMARS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model; one that nearly agrees with it; one of another shape that does not."""
    from safetensors.numpy import load_file, save_file

    model = write_tokenizer(save_random_llama(tmp_path_factory.mktemp("model")))
    near = tmp_path_factory.mktemp("near")
    numbers = np.random.default_rng(1)
    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        weights[name] = value + numbers.normal(size=value.shape, scale=0.01).astype(np.float32)
    save_file(weights, near / "model.safetensors")
    (near / "config.json").write_text((model / "config.json").read_text())
    far = tmp_path_factory.mktemp("far")
    save_random_llama(far, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return {"itself": model, "near": near, "far": far}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The answers to `REQUESTS` without drafts."""
    core = EngineCore(tiny_config(str(folders["itself"])))
    answers = {name: [tokens(deltas) for deltas in run(core, PROMPTS, params)] for name, params in REQUESTS.items()}
    core.shutdown()
    return answers


@contextmanager
def drafting(folders: dict[str, Path], draft: str, **changes: Any) -> Iterator[EngineCore]:
    speculative = {"model": str(folders[draft]), "num_speculative_tokens": 4, "adaptive": False}
    core = EngineCore(tiny_config(str(folders["itself"]), speculative_config=speculative, **changes))
    yield core
    core.shutdown()


def check(core: EngineCore, wanted: dict[str, list[list[int]]], name: str = "plain") -> float:
    """Run twice, the second time from the prefix cache; returns the part of the drafts that was accepted."""
    before = core.stats().drafts
    for _ in range(2):
        given = run(core, PROMPTS, REQUESTS[name], cache_salt=name)
        assert [tokens(deltas) for deltas in given] == wanted[name]
    stats = core.stats()
    assert stats.num_compiles_after_ready == 0
    assert stats.kv_cache_usage == 0
    num_drafts = stats.drafts.num_draft_tokens - before.num_draft_tokens
    assert num_drafts > 30
    return (stats.drafts.num_accepted_tokens - before.num_accepted_tokens) / num_drafts


ONE_BUCKET = {"max_num_batched_tokens": 32, "token_buckets": (32,)}  # fewer programs to compile
WAYS = {
    "batched": {},
    "synchronous": ONE_BUCKET | {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 8, "token_buckets": (8,)},
    "preempted": ONE_BUCKET | {"num_gpu_blocks_override": 37, "block_size": 4, "max_model_len": 100},
    "two devices": ONE_BUCKET | {"tensor_parallel_size": 2},
    "two data shards": ONE_BUCKET | {"data_parallel_size": 2},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS.keys())
def test_the_model_itself_guesses_every_token_right_under_grammars_too(folders, wanted, changes) -> None:
    with drafting(folders, "itself", **changes) as core:
        assert check(core, wanted) > 0.99
        assert core.stats().num_preemptions > 0 or "num_gpu_blocks_override" not in changes
        assert check(core, wanted, "grammars") > 0.99


def test_a_model_that_nearly_agrees_saves_steps_and_changes_no_answer(folders, wanted) -> None:
    with drafting(folders, "near", **ONE_BUCKET) as core:
        assert 0.2 < check(core, wanted) < 0.95
        assert 0 < check(core, wanted, "grammars") < 1


@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 16, "token_buckets": (8, 16)}])
def test_a_model_of_another_shape_that_agrees_on_nothing_changes_no_answer(folders, wanted, changes) -> None:
    with drafting(folders, "far", **changes) as core:
        assert check(core, wanted) < 0.2


def test_whoever_shares_the_blocks_of_a_sequence_that_ended_with_an_accepted_draft_fills_the_gap(folders) -> None:
    with drafting(folders, "itself", max_num_seqs=2, **ONE_BUCKET) as core:
        first = PROMPTS[1]
        (deltas,) = run(core, [first], greedy(33 - len(first)))  # what is computed ends with block 1, at position 31
        assert len(deltas[-1].token_ids) > 1
        runner: Any = core._runner
        plans = []
        dispatch = runner.dispatch
        runner.dispatch = lambda plan: plans.append(plan) or dispatch(plan)
        run(core, [[*first, *tokens(deltas), 7]], greedy(4))
        assert plans[0].starts == [32]
        shared = plans[0].new_slots[0].block_ids[:2]
        for ours, theirs in zip(runner._drafts._caches, runner._caches, strict=True):
            for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(one[np.array(shared)], other[np.array(shared)], atol=1e-5)


def test_a_pool_of_so_many_bytes_is_shared_between_both(folders) -> None:
    size = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1024 * 1024}
    with drafting(folders, "itself", **ONE_BUCKET, **size) as core:
        assert core.info.num_blocks == 1024 * 1024 // (2 * BLOCK_BYTES)


def test_on_a_device_with_memory_of_its_own_both_models_get_their_part(folders, wanted, monkeypatch) -> None:
    pool_bytes = 2**20

    def read(device: object, *, share: float, step_bytes: int) -> DeviceMemory:
        return DeviceMemory(limit_bytes=pool_bytes + step_bytes, in_use_bytes=0, step_bytes=step_bytes)

    monkeypatch.setattr(assembly, "blocks_on_cpu", lambda spec, **counts: None)
    monkeypatch.setattr(DeviceMemory, "read", read)
    with drafting(folders, "itself", **ONE_BUCKET, num_gpu_blocks_override=None) as core:
        assert 0.8 * pool_bytes < core.info.num_blocks * 2 * BLOCK_BYTES <= pool_bytes
        assert check(core, wanted) > 0.99


def test_a_draft_model_that_cannot_draft_is_refused_by_name(folders, tmp_path) -> None:
    other = save_random_llama(tmp_path / "other", vocab_size=321, num_hidden_layers=1)
    short = save_random_llama(tmp_path / "short", max_position_embeddings=64, num_hidden_layers=1)
    odd = save_random_llama(tmp_path / "odd", intermediate_size=45, num_hidden_layers=1)
    speculative = {"model": str(short), "max_model_len": 65}
    with pytest.raises(ConfigError, match=r"takes 64 tokens, max_model_len is 65; set .* or speculative_config's own"):
        EngineCore(tiny_config(str(folders["itself"]), speculative_config=speculative))
    for folder, message, changes in (
        (other, "has a vocabulary of 321 tokens, the model has 320", {}),
        (short, "takes 64 tokens, max_model_len is 128", {}),
        (
            odd,
            r"draft model .*must divide num_attention_heads .* and intermediate_size \(45\)",
            {"tensor_parallel_size": 2},
        ),
    ):
        with pytest.raises(ConfigError, match=message), drafting(folders | {"bad": folder}, "bad", **changes):
            pass


def test_a_draft_model_whose_tokens_have_other_ids_is_refused_and_names_one(tmp_path) -> None:
    model, draft = (write_config(tmp_path / name) for name in ("model", "draft"))
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 257, "content": "<more>"})
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    sources = [resolve_source(folder) for folder in (draft, model)]
    assert first_difference(*sources) is None  # a token at the end that the model lacks
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    lowest = min(vocab["A"], vocab["B"])
    config = tiny_config(str(model), load_format="dummy", speculative_config={"model": str(draft)})
    with pytest.raises(ConfigError, match=rf"token {lowest} is 'B' to it and 'A' to the model; a draft model must"):
        EngineCore(config)
