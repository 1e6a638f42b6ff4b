"""A server that drafts, beside the shared one that does not: the same streams, in fewer chunks."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.e2e.server import MODEL, NAME, SMALL_SHAPES, ServerProcess

CONFIG = '{"method": "ngram", "num_speculative_tokens": 6, "adaptive": false}'
COUNTING = "Count: 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3,"


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("drafting") / "log"
    arguments = (MODEL, "--served-model-name", NAME, *SMALL_SHAPES, "--speculative-config", CONFIG)
    with ServerProcess(log, *arguments) as running:
        yield running


def streamed(url: str, **parameters) -> list[str]:
    """The texts of a stream's chunks."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        chunks = client.completions.create(
            model=NAME, prompt=COUNTING, max_tokens=40, stream=True, extra_body={"ignore_eos": True}, **parameters
        )
        return [chunk.choices[0].text for chunk in chunks if chunk.choices]


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": 0.5, "seed": 5}])
def test_a_stream_says_the_same(server, drafting, parameters):
    wanted, given = streamed(server.url, **parameters), streamed(drafting.url, **parameters)
    assert "".join(given) == "".join(wanted)
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
