"""Servers that draft: by lookup, beside the shared one that does not, and with an EAGLE-3 head. The same streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.checkpoints import save_random_llama, transformers_greedy
from tests.e2e.server import MODEL, NAME, SMALL_SHAPES, ServerProcess
from tests.e2e.tiny_model import TINY_SHAPES, write_tokenizer
from tests.quick_compiles import QUICK_COMPILES
from tests.speculative.heads import save_eagle3, train_eagle3

CONFIG = '{"method": "ngram", "num_speculative_tokens": 6, "adaptive": false}'
COUNTING = "Count: 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3,"


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("drafting") / "log"
    arguments = (MODEL, "--served-model-name", NAME, *SMALL_SHAPES, "--speculative-config", CONFIG)
    with ServerProcess(log, *arguments) as running:
        yield running


def streamed(url: str, *, extra: dict | None = None, **parameters) -> list[str]:
    """The texts of a stream's chunks."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        chunks = client.completions.create(
            model=NAME,
            prompt=COUNTING,
            max_tokens=40,
            stream=True,
            extra_body=extra or {"ignore_eos": True},
            **parameters,
        )
        return [chunk.choices[0].text for chunk in chunks if chunk.choices]


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": 0.5, "seed": 5}])
def test_a_stream_says_the_same(server, drafting, parameters):
    wanted, given = streamed(server.url, **parameters), streamed(drafting.url, **parameters)
    assert "".join(given) == "".join(wanted)
    assert len(given) < len(wanted)


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": 1.0, "seed": 2}])
def test_an_answer_under_a_grammar_is_the_same(server, drafting, parameters):
    counting = {"structured_outputs": {"regex": "( [0-9],)+ end"}, "repetition_penalty": 1.05}
    wanted, given = (streamed(url, extra=counting, **parameters) for url in (server.url, drafting.url))
    assert "".join(given) == "".join(wanted)
    assert set("".join(wanted)) <= set(" 0123456789,end")
    assert len(given) < len(wanted)


def test_drafts_show_in_the_metrics_and_nothing_was_compiled_late(drafting):
    streamed(drafting.url, temperature=0)
    text = httpx.get(f"{drafting.url}/metrics").text
    assert drafting.metric("spec_decode_num_accepted_tokens_total") > 10
    assert drafting.metric("spec_decode_num_draft_tokens_total") >= drafting.metric("spec_decode_num_drafts_total")
    assert 'spec_decode_num_accepted_tokens_per_pos_total{engine="0",' in text
    assert drafting.metric("compiles_after_ready_total") == 0
    assert drafting.metric("kv_cache_usage_perc") == 0
    assert "Traceback" not in drafting.log.read_text()


def test_a_server_with_an_eagle3_head_streams_the_model_s_own_tokens(tmp_path: Path):
    model = write_tokenizer(save_random_llama(tmp_path / "model"))
    prompt, num_tokens = [5, 9, 17, 30, 2, 8], 60
    (wanted,) = transformers_greedy(model, [prompt], num_tokens)
    head = save_eagle3(train_eagle3(model, [prompt + wanted]), tmp_path / "head")
    config = json.dumps({"method": "eagle3", "model": str(head), "num_speculative_tokens": 3})
    arguments = (str(model), *TINY_SHAPES, "--speculative-config", config)
    with ServerProcess(tmp_path / "log", *arguments, env=QUICK_COMPILES) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            chunks = client.completions.create(
                model=str(model),
                prompt=prompt,
                max_tokens=num_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            given = [(chunk.choices[0].model_extra or {}).get("token_ids") for chunk in chunks if chunk.choices]
        assert [token_id for token_ids in given for token_id in token_ids or ()] == wanted
        assert running.metric("spec_decode_num_accepted_tokens_total") > 10
        assert running.metric("compiles_after_ready_total") == 0
