"""Draft heads in the engine: they guess what their references guess, and never change an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxserve.engine import assembly
from jaxserve.engine.core import EngineCore
from jaxserve.runner.memory import DeviceMemory
from jaxserve.sampling_params import SamplingParams
from tests.checkpoints import save_random_llama
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.speculative.heads import (
    model_features,
    random_eagle3,
    save_eagle3,
    save_mimo,
    train_eagle3,
    transformers_model,
)
from tests.speculative.reference_heads import Reference, reference_drafts
from tests.structured.requests import CONSTRAINTS, constrained

NUM_TOKENS = 24
NUM_DRAFTS = 3
ONE_BUCKET = {"max_num_batched_tokens": 32, "token_buckets": (32,)}  # fewer programs to compile
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


@dataclass(frozen=True)
class Setting:
    """A model and its head."""

    model: Path
    reads_final: bool  # hidden states, rather than inner ones
    speculative: dict[str, Any]
    head: Reference
    wanted: list[list[int]]

    def core(self, **changes: Any) -> EngineCore:
        speculative = {"num_speculative_tokens": NUM_DRAFTS, "adaptive": False} | self.speculative
        return EngineCore(tiny_config(str(self.model), speculative_config=speculative, **changes))


def answers(model: Path) -> list[list[int]]:
    core = EngineCore(tiny_config(str(model), **ONE_BUCKET))
    given = [tokens(deltas) for deltas in run(core, PROMPTS, PARAMS)]
    core.shutdown()
    return given


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A head that has learnt the answers by heart."""
    model = save_random_llama(tmp_path_factory.mktemp("model"))
    wanted = answers(model)
    head = train_eagle3(model, [prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)])
    folder = save_eagle3(head, tmp_path_factory.mktemp("head"))
    return Setting(model, False, {"method": "eagle3", "model": str(folder)}, head, wanted)


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A random head, in the checkpoint of its model."""
    model, head = save_mimo(tmp_path_factory.mktemp("mimo"))
    return Setting(model, True, {"method": "mtp"}, head, answers(model))


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A head that is right about every greedy token."""
    model, head = save_mimo(tmp_path_factory.mktemp("sure"), is_markov=True)
    return Setting(write_tokenizer(model), True, {"method": "mtp"}, head, [])


def greedy_answer(model: Path, prompt: list[int]) -> list[int]:
    """From transformers, whose own config it takes: everything is computed again for each token."""
    sequence = list(prompt)
    loaded = transformers_model(model)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            sequence.append(int(loaded(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def check(setting: Setting, core: EngineCore) -> float:
    """Run twice, the second time from the prefix cache; returns the part of the drafts that was accepted."""
    for _ in range(2):
        assert [tokens(deltas) for deltas in run(core, PROMPTS, PARAMS)] == setting.wanted
    stats = core.stats()
    assert stats.num_compiles_after_ready == 0
    assert stats.kv_cache_usage == 0
    core.shutdown()
    assert stats.drafts.num_draft_tokens > 50
    return stats.drafts.num_accepted_tokens / stats.drafts.num_draft_tokens


WAYS = {
    "batched": ONE_BUCKET,
    "chunked, synchronous": {"max_num_batched_tokens": 8, "token_buckets": (8,), "async_scheduling": False},
    "preempted": ONE_BUCKET | {"num_gpu_blocks_override": 37, "block_size": 4, "max_model_len": 100},
    "two devices, two data shards": ONE_BUCKET | {"tensor_parallel_size": 2, "data_parallel_size": 2},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS.keys())
def test_a_trained_eagle3_head_saves_steps_and_changes_no_answer(eagle3: Setting, changes: dict) -> None:
    core = eagle3.core(**changes)
    assert check(eagle3, core) > 0.3
    stats = core.stats()
    assert stats.num_preemptions > 0 or "num_gpu_blocks_override" not in changes
    assert stats.prefix_hit_tokens > 0


def test_a_random_mtp_head_changes_no_answer_on_two_devices(mimo: Setting) -> None:
    assert check(mimo, mimo.core(**ONE_BUCKET, tensor_parallel_size=2)) < 0.5


def test_a_head_that_says_what_the_model_says_is_right_about_every_greedy_token(sure: Setting) -> None:
    core = sure.core(**WAYS["preempted"])
    prompts = PROMPTS[1:]  # behind a prompt of one token the head has seen no token
    given = [tokens(deltas) for deltas in run(core, prompts, greedy(NUM_TOKENS))]
    stats = core.stats()
    core.shutdown()
    assert stats.num_preemptions > 0
    assert stats.drafts.num_draft_tokens == stats.drafts.num_accepted_tokens > 50
    assert max(stats.drafts.accepted_per_position[1:]) > 10
    assert given == [greedy_answer(sure.model, prompt) for prompt in prompts]


def test_what_a_head_draws_obeys_the_grammar_of_the_request(sure: Setting) -> None:
    names = ("json", "regex", "choice", "grammar")
    params = [constrained(greedy(NUM_TOKENS), CONSTRAINTS[name]) for name in names] + [greedy(NUM_TOKENS)]
    prompts = PROMPTS[1:]
    plain = EngineCore(tiny_config(str(sure.model), **ONE_BUCKET))
    core = sure.core(**ONE_BUCKET, data_parallel_size=2)
    given, wanted = ([tokens(deltas) for deltas in run(engine, prompts, params)] for engine in (core, plain))
    drafts = core.stats().drafts
    for engine in (core, plain):
        engine.shutdown()
    assert given == wanted
    assert drafts.num_draft_tokens == drafts.num_accepted_tokens > 30


def test_a_head_that_has_no_token_that_the_grammar_allows_changes_no_answer(tmp_path: Path) -> None:
    model = write_tokenizer(save_random_llama(tmp_path / "model"))
    few = {"draft_vocab_size": 10}
    head = save_eagle3(random_eagle3(model, **few), tmp_path / "head", **few)
    params = [constrained(greedy(12), CONSTRAINTS["json"]), constrained(greedy(12), CONSTRAINTS["choice"])]
    given = []
    for speculative in (None, {"method": "eagle3", "model": str(head), "adaptive": False}):
        core = EngineCore(tiny_config(str(model), speculative_config=speculative, **ONE_BUCKET))
        given.append([tokens(deltas) for deltas in run(core, PROMPTS[1:3], params)])
        core.shutdown()
    assert given[0] == given[1]
    assert core.stats().drafts.num_draft_tokens > 20


@pytest.mark.parametrize(("name", "way"), [("eagle3", "batched"), ("mimo", "chunked, synchronous")])
def test_greedy_drafts_are_those_of_the_reference(name: str, way: str, request: pytest.FixtureRequest) -> None:
    setting: Setting = request.getfixturevalue(name)
    core = setting.core(enable_prefix_caching=False, **WAYS[way])
    seen: list[tuple[str, int, Callable[[], dict[int, list[int]]], int]] = []
    dispatch = core._runner.dispatch

    def watched(plan):
        pending = dispatch(plan)
        for row, draft_ids in plan.drafts.items():
            known = plan.starts[row] + plan.num_tokens[row] - len(draft_ids)
            fetch: Any = pending.draft_ids.fetch  # type: ignore[attr-defined]
            seen.append((plan.request_ids[row], known, fetch, row))
        return pending

    core._runner.dispatch = watched
    given = [tokens(deltas) for deltas in run(core, PROMPTS, greedy(NUM_TOKENS))]
    core.shutdown()
    for index in (0, 4):  # whose answers without drafts are greedy, too
        assert given[index][: len(setting.wanted[index])] == setting.wanted[index]
    sequences = {f"r{index}": PROMPTS[index] + answer for index, answer in enumerate(given)}
    features = {
        request_id: model_features(setting.model, sequence, final=setting.reads_final)
        for request_id, sequence in sequences.items()
    }
    assert len(seen) > 20
    for request_id, known, fetch, row in seen:
        drafts = fetch()[row]
        sequence = sequences[request_id][:known]
        assert drafts == reference_drafts(setting.head, features[request_id], sequence, len(drafts))


def test_on_a_device_with_memory_of_its_own_both_get_their_part(eagle3: Setting, monkeypatch) -> None:
    pool_bytes = 400 * 1024

    def read(device: object, *, share: float, step_bytes: int) -> DeviceMemory:
        return DeviceMemory(limit_bytes=pool_bytes + step_bytes, in_use_bytes=0, step_bytes=step_bytes)

    monkeypatch.setattr(assembly, "blocks_on_cpu", lambda spec, **counts: None)
    monkeypatch.setattr(DeviceMemory, "read", read)
    core = eagle3.core(**ONE_BUCKET, num_gpu_blocks_override=None)
    block_bytes = 2 * 16 * 4 * (3 * 2 * 16 + 1 * 2 * 16)  # K and V, positions, bytes; the model's heads, the head's
    assert 0.8 * pool_bytes < core.info.num_blocks * block_bytes <= pool_bytes
    assert check(eagle3, core) > 0.3
