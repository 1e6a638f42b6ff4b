"""The routes beside the answers: models, tokens, health, metrics, and the README's own examples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import httpx
import pytest

from tests.e2e.server import MAX_MODEL_LEN, MODEL, NAME, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = [
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total", "compiles_after_ready_total"),
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket"),
    *("request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket"),
]


def test_the_model_is_listed_and_shown(client):
    models = client.models.list().data
    assert [model.id for model in models] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    assert models[0].max_model_len == MAX_MODEL_LEN
    assert models[0].root == MODEL


def test_health_ready_ping_and_version_answer(http):
    assert http.get("/health").json() == {"status": "ready"}
    assert http.get("/ready").json() == {"status": "ready", "detail": "", "num_restarts": 0}
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": version("jaxserve")}


@pytest.mark.parametrize(
    "text",
    [
        "", "Hello, world!", "  two  spaces\n\ttabs\r\n", "naïve café — 日本語 😀👩\u200d👧",
        "<|im_start|>user\nhi<|im_end|>", "\x00\x7f",
    ],
)  # fmt: skip
def test_text_becomes_tokens_and_the_same_text_again(http, text):
    tokens = http.post("/tokenize", json={"model": NAME, "prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert http.post("/detokenize", json={"model": NAME, "tokens": tokens["tokens"]}).json() == {"prompt": text}


def test_a_conversation_is_tokenised_as_the_chat_sees_it(client, http):
    messages = [{"role": "user", "content": "Name three rivers."}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    assert tokens["count"] == chat.usage.prompt_tokens
    text = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n")


def test_metrics_have_their_names_and_count(client, http, server):
    before = server.metric("generation_tokens_total")
    client.completions.create(model=NAME, prompt="Hello", max_tokens=3, extra_body={"ignore_eos": True})
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert [name for name in METRICS if f"\njaxserve:{name}{{" not in reply.text] == []
    assert 'num_gpu_blocks="129"' in reply.text
    assert server.metric("generation_tokens_total") == before + 3


def test_openapi_lists_the_routes(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"}


def readme_blocks(language: str, marker: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if marker in block]


def test_the_curl_command_of_the_readme_gets_an_answer(server):
    [block] = readme_blocks("bash", "curl ")
    shell = block.replace("http://127.0.0.1:8000", server.url).replace('"max_tokens": 64', '"max_tokens": 8')
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 8


def test_the_openai_example_of_the_readme_prints_an_answer(server):
    [block] = readme_blocks("python", "from openai import OpenAI")
    code = block.replace("http://127.0.0.1:8000", server.url).replace("stream=True", "stream=True, max_tokens=8")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 8


def test_a_large_text_to_tokenise_holds_up_nobody(http, server):
    with ThreadPoolExecutor() as threads:
        tokenising = threads.submit(http.post, "/tokenize", json={"prompt": "x" * 3_000_000})
        slowest_s = 0.0
        begin_s = time.monotonic()
        while not tokenising.done():
            asked_s = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - asked_s)
    assert tokenising.result().json()["count"] == 750_000
    assert slowest_s < (time.monotonic() - begin_s) / 2
