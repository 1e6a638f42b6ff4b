"""The engine core on a tiny model: log-probabilities, sampling, failing rows, penalties, and no compile after ready."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import ModelSettings
from jaxserve.engine import assembly
from jaxserve.engine.core import EngineCore
from jaxserve.errors import CheckpointError, ConfigError, PromptTooLongError, QueueFullError
from jaxserve.outputs import FinishReason
from jaxserve.request import EngineRequest
from jaxserve.runner.loading import open_model
from jaxserve.runner.memory import DeviceMemory
from jaxserve.sampling_params import SamplingParams
from tests.checkpoints import save_random_llama, transformers_logits
from tests.harness import greedy, run, tiny_config, tokens

POISON = 300  # a token whose embedding is not a number
PROMPT = np.random.default_rng(3).integers(3, 290, 70).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def core(checkpoint: Path) -> Iterator[EngineCore]:
    core = EngineCore(tiny_config(str(checkpoint), max_queued_requests=12))
    yield core
    core.shutdown()


@pytest.fixture(scope="module")
def logits(checkpoint: Path) -> np.ndarray:
    return transformers_logits(checkpoint, PROMPT).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_prompt_logprobs_over_several_chunks_are_those_of_transformers(core: EngineCore, logits: np.ndarray) -> None:
    deltas = run(core, [PROMPT], greedy(2, prompt_logprobs=3))[0]
    (entries,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:]] == PROMPT[1:]
    wanted = log_softmax(logits)
    for position, entry in enumerate(entries[1:]):
        scores = wanted[position]
        assert entry.logprob == pytest.approx(scores[PROMPT[position + 1]], abs=1e-3)
        assert entry.top_token_ids == np.argsort(-scores, kind="stable")[:3].tolist()
        assert entry.rank == 1 + int((scores > scores[PROMPT[position + 1]]).sum())


def test_logprobs_of_generated_tokens_come_with_as_many_alternatives_as_asked(core: EngineCore, logits) -> None:
    params = [greedy(3, logprobs=0), greedy(3, logprobs=20), greedy(3)]
    none, twenty, unasked = run(core, [PROMPT] * 3, params, cache_salt="x")
    first = none[0].logprobs[0]
    assert first.logprob == pytest.approx(log_softmax(logits[-1]).max(), abs=1e-3)
    assert first.top_token_ids == []
    assert [len(entry.top_token_ids) for delta in twenty for entry in delta.logprobs] == [20] * 3
    assert all(delta.logprobs is None for delta in unasked)
    assert tokens(none) == tokens(twenty) == tokens(unasked)


def test_a_seed_gives_the_same_text_whatever_else_runs(core: EngineCore) -> None:
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=2**40 + 5, max_tokens=20, ignore_eos=True)
    alone = tokens(run(core, [PROMPT[:9]], seeded)[0])
    others = [SamplingParams(seed=s, max_tokens=12, presence_penalty=0.5 * (s % 2), ignore_eos=True) for s in range(7)]
    prompts = [PROMPT[i : i + 3 + i] for i in range(7)]
    together = run(core, [*prompts, PROMPT[:9]], [*others, seeded])
    assert tokens(together[-1]) == alone


def test_a_repetition_penalty_sees_prompt_and_answer(core: EngineCore) -> None:
    params = greedy(12, repetition_penalty=100.0)
    answer = tokens(run(core, [PROMPT[:10]], params)[0])
    assert len(set(answer)) == len(answer)
    assert not set(answer) & set(PROMPT[:10])


def test_min_tokens_holds_the_end_back(core: EngineCore) -> None:
    eos = {"ignore_eos": False, "logit_bias": {2: 100.0}}
    ended = run(core, [PROMPT[:5]], greedy(9, **eos))[0]
    held = run(core, [PROMPT[:5]], greedy(9, min_tokens=4, **eos))[0]
    assert tokens(ended) == [2]
    assert len(tokens(held)) == 5
    assert held[-1].finish_reason is FinishReason.STOP


def test_an_aborted_request_frees_its_blocks_within_two_steps(core: EngineCore) -> None:
    request = EngineRequest(request_id="gone", prompt_token_ids=PROMPT, sampling_params=greedy(50), eos_token_ids=[2])
    core.add_request(request)
    for _ in range(5):
        core.step()
    assert core.stats().kv_cache_usage > 0
    (delta,) = core.abort(["gone"])
    assert delta.finish_reason is FinishReason.ABORT
    core.step()
    core.step()
    assert core.stats().kv_cache_usage == 0
    assert not core.has_unfinished


def test_a_prompt_beyond_the_context_and_a_full_queue_are_refused(core: EngineCore) -> None:
    def request(name: str, prompt: list[int]) -> EngineRequest:
        return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling_params=greedy(5), eos_token_ids=[2])

    with pytest.raises(PromptTooLongError):
        core.add_request(request("long", [5] * 200))
    with pytest.raises(QueueFullError):
        for index in range(13):
            core.add_request(request(f"q{index}", PROMPT[:5]))
    core.abort([f"q{index}" for index in range(13)])
    while core.has_unfinished:
        core.step()


def test_a_request_whose_rules_leave_no_token_ends_alone_and_its_prefix_stays_cached(core: EngineCore) -> None:
    params = greedy(5, allowed_token_ids=[2], min_tokens=3, ignore_eos=False)
    (failed,) = run(core, [PROMPT[:40]], params, cache_salt="ruled out")
    assert failed[-1].finish_reason is FinishReason.ERROR
    assert "this request's penalties, logit_bias or forbidden tokens" in failed[-1].error
    (after,) = run(core, [PROMPT[:40]], greedy(2), cache_salt="ruled out")
    assert after[0].num_cached_tokens == 32


def test_nothing_so_far_was_compiled_after_ready(core: EngineCore) -> None:
    assert core.stats().num_compiles_after_ready == 0


def test_a_row_that_is_not_finite_ends_alone(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    poisoned = load_file(checkpoint / "model.safetensors")
    poisoned["model.embed_tokens.weight"][POISON] = np.nan
    save_file(poisoned, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    core = EngineCore(tiny_config(str(tmp_path)))
    healthy = tokens(run(core, [PROMPT[:20]], greedy(10))[0])
    prompts = [[POISON, 5, 6], PROMPT[:20], [7, POISON]]
    first, second, third = run(core, prompts, greedy(10), cache_salt="with poison")
    assert tokens(second) == healthy
    for failed in (first, third):
        assert failed[-1].finish_reason is FinishReason.ERROR
        assert "not finite" in failed[-1].error
    # Blocks that the failed sequences wrote are taken by others, who must not see what is left in them.
    again = run(core, [PROMPT[:20]] * 6, greedy(10), cache_salt="after poison")
    assert [tokens(deltas) for deltas in again] == [healthy] * 6
    assert core.stats().kv_cache_usage == 0
    core.shutdown()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tensor_parallel_size": 64}, ConfigError, "tensor_parallel_size is 64"),
        ({"tensor_parallel_size": 3}, ConfigError, r"num_attention_heads \(8\).*sizes that work: 1, 2, 4, 8$"),
        ({"tensor_parallel_size": 4, "data_parallel_size": 4}, ConfigError, "they take 16 devices, but cpu has 8"),
        ({"hf_overrides": {"partial_rotary_factor": 0.5}}, CheckpointError, "partial_rotary_factor 0.5"),
        ({"hf_overrides": {"rope_parameters": {"full_attention": {}}}}, CheckpointError, "differ by layer type"),
        ({"max_model_len": 100000}, ConfigError, "max_position_embeddings is 256"),
        ({"hf_overrides": {"architectures": ["LamaForCausalLM"]}}, CheckpointError, "did you mean 'LlamaForCausalLM'"),
        ({"hf_overrides": {"hidden_size": 32, "head_dim": 8}}, CheckpointError, "the model wants"),
        ({"attention_backend": "mosaic_gpu", "device": "auto"}, ConfigError, "attention_backend 'mosaic_gpu'"),
        ({"hf_overrides": {"num_hidden_layers": 4}}, CheckpointError, "lacks"),
        ({"hf_overrides": {"num_hidden_layers": 2}}, CheckpointError, "has no place for"),
    ],
)
def test_what_cannot_be_started_says_why(checkpoint: Path, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        EngineCore(tiny_config(str(checkpoint), **changes))


def test_a_device_that_is_not_there_is_named(checkpoint: Path) -> None:
    code = "import sys; from tests.harness import *; EngineCore(tiny_config(sys.argv[1], device='tpu'))"
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=False)
    assert "ConfigError: device 'tpu' is not available" in done.stderr


def test_a_device_with_memory_of_its_own_gets_a_pool_of_what_is_left(
    checkpoint: Path, core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(device: object, *, share: float, step_bytes: int) -> DeviceMemory:
        assert share == 0.5
        assert step_bytes > 0
        return DeviceMemory(limit_bytes=10 * 2**20, in_use_bytes=2**20, step_bytes=step_bytes)

    monkeypatch.setattr(assembly, "blocks_on_cpu", lambda spec, **counts: None)
    monkeypatch.setattr(DeviceMemory, "read", read)
    config = tiny_config(str(checkpoint), num_gpu_blocks_override=None, token_buckets=(64,), gpu_memory_utilization=0.5)
    sized = EngineCore(config)
    assert "profile" in sized.info.startup_s
    assert 2 < sized.info.num_blocks <= 9 * 2**20 // (3 * 16 * 2 * 2 * 16 * 4)
    given, wanted = (run(c, [PROMPT[:30]], greedy(5), cache_salt="sized")[0] for c in (sized, core))
    assert tokens(given) == tokens(wanted)
    sized.shutdown()


def test_end_of_sequence_ids_stay_when_sampling_defaults_are_ignored(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.0, "top_k": 5}')
    given = {}
    for mode in ("auto", "vllm"):
        files = open_model(ModelSettings(model=str(checkpoint), generation_config=mode))
        given[mode] = (files.eos_token_ids, files.default_sampling)
    assert given == {"auto": ([2, 7], {"temperature": 0.0, "top_k": 5}), "vllm": ([2, 7], {})}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, got 'hot'"),
        ({"eos_token_id": "x"}, "'eos_token_id' must be an integer from 0 to 2147483647, or a list of such, got 'x'"),
    ],
)
def test_impossible_values_of_a_generation_config_are_named_at_the_start(
    checkpoint: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"^generation_config\.json: {message}"):
        open_model(ModelSettings(model=str(tmp_path)))
