"""Three engines behind one address, on a Ray cluster of several nodes: cached prefixes, deaths, metrics, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from jaxserve import LLM, SamplingParams
from tests.deploy.conftest import BLOCK_SIZE, NUM_REPLICAS, SETTINGS_OF_ENGINE
from tests.e2e.server import ServerProcess, wait_for

NUM_REQUESTS, NUM_PREFIXES, PREFIX_LEN = 200, 10, 10 * BLOCK_SIZE
CONCURRENCY = 16
ENGINE_TITLE = "ray::ServeReplica:jaxserve:Engine"


def prompt(number: int) -> str:
    """Request `number`: one of the shared prefixes, and an ending of its own; a token a byte."""
    prefix = f"{number % NUM_PREFIXES}: the quick brown fox jumps over the lazy dog; ".ljust(PREFIX_LEN, "-")
    return f"{prefix} and then, {number}"


def samples(server: ServerProcess, name: str) -> dict[str, float]:
    """A metric's values, by replica (or whatever its last label says)."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return {
        sample.labels.get("to") or sample.labels.get("replica") or sample.labels["api_server"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.fixture(scope="module")
def engine(tiny_model) -> Iterator[LLM]:
    """A single engine with the same settings, in this process."""
    with LLM(str(tiny_model), **SETTINGS_OF_ENGINE) as llm:
        yield llm


def expected(engine: LLM, prompts: list[str], max_tokens: int) -> tuple[list[str], int]:
    """What a single engine answers, and the prompt tokens that it finds in its cache."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs], sum(output.num_cached_tokens for output in outputs)


def client_of(server: ServerProcess) -> AsyncOpenAI:
    """OpenAI's own client; it does not try again, so that no failure is hidden."""
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


OPTIONS: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "extra_body": {"ignore_eos": True}}


async def ask_until_all_have_answered(server: ServerProcess) -> dict[str, float]:
    """Return when the API server has heard of every replica, with the requests that it sent to each."""
    async with httpx.AsyncClient(timeout=60) as client, asyncio.timeout(60):
        while len(sent := samples(server, "jaxserve:replica_requests_total")) < NUM_REPLICAS:
            bodies = [{"prompt": f"warm-up {number}", "max_tokens": 2} for number in range(NUM_REPLICAS)]
            await asyncio.gather(*(client.post(f"{server.url}/v1/completions", json=body) for body in bodies))
    return sent


async def test_shared_prefixes_are_found_as_often_as_by_a_single_engine(deployment, engine):
    prompts = [prompt(number) for number in range(NUM_REQUESTS)]
    texts, num_cached_by_one = expected(engine, prompts, 8)
    sent_before = await ask_until_all_have_answered(deployment)
    gate = asyncio.Semaphore(CONCURRENCY)
    async with client_of(deployment) as client:

        async def ask(text: str) -> Any:
            async with gate:
                return await client.completions.create(prompt=text, max_tokens=8, **OPTIONS)

        replies = await asyncio.gather(*(ask(text) for text in prompts))
    assert [reply.choices[0].text for reply in replies] == texts
    cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in replies]
    assert num_cached_by_one == (NUM_REQUESTS - NUM_PREFIXES) * PREFIX_LEN, "the single engine computes each once"
    assert sum(cached) >= 0.8 * num_cached_by_one
    # Sent anywhere, each prefix would be computed by each engine.
    assert cached.count(0) < 2 * NUM_PREFIXES
    taken = Counter(samples(deployment, "jaxserve:replica_requests_total"))
    taken.subtract(sent_before)
    assert len(taken) == NUM_REPLICAS and min(taken.values()) >= NUM_REQUESTS / NUM_PREFIXES, "none is left out"
    assert sum(taken.values()) == NUM_REQUESTS


def test_metrics_are_those_of_all(deployment):
    hits = samples(deployment, "jaxserve:prefix_cache_hits_total")
    ended = samples(deployment, "jaxserve:request_generation_tokens_count")
    assert len(hits) == NUM_REPLICAS and all(value > 0 for value in hits.values())
    assert (
        hits.keys()
        == ended.keys()
        == samples(deployment, "process_cpu_seconds_total").keys() - samples(deployment, "http_requests_total").keys()
    )
    assert sum(ended.values()) >= NUM_REQUESTS


def test_several_prompts_of_one_request_are_spread_and_answered_in_order(deployment, engine):
    prompts = [f"prompt {number}" for number in range(12)]
    body = {"prompt": prompts, "max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    reply = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=60)
    assert [choice["text"] for choice in reply.json()["choices"]] == expected(engine, prompts, 4)[0]
    assert reply.headers.get_list("x-request-id") == [reply.headers["x-request-id"]]


def test_a_client_that_leaves_frees_its_replica(deployment):
    names = ("jaxserve:num_requests_running", "jaxserve:num_requests_waiting")
    body = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "n": 64, "stream": True}
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # closing them would close the stream
        next(lines)
        wait_for(lambda: sum(samples(deployment, names[0]).values()) > 0, 10, "news of the running request")
    wait_for(
        lambda: (
            not any(samples(deployment, f"jaxserve:num_requests_{state}") for state in ("running", "waiting"))
            or not sum(
                sum(samples(deployment, f"jaxserve:num_requests_{state}").values()) for state in ("running", "waiting")
            )
        ),
        20,
        "the aborted request's end",
    )


def test_wrong_requests_are_refused_in_openais_form(deployment):
    for body, status, code in (
        ({"prompt": "abc", "max_tokens": 9999}, 400, "context_length_exceeded"),
        ({"prompt": "abc", "model": "other"}, 404, "model_not_found"),
        ({"prompt": ""}, 400, None),
    ):
        reply = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def ask_many(client: AsyncOpenAI, prompts: list[str], max_tokens: int) -> list[asyncio.Task[str]]:
    """Ask all at once, without streaming."""

    async def ask(text: str) -> str:
        reply = await client.completions.create(prompt=text, max_tokens=max_tokens, **OPTIONS)
        return reply.choices[0].text

    return [asyncio.ensure_future(ask(text)) for text in prompts]


class Stream:
    """An answer as it comes: its text, and the error that ended it, if one did."""

    def __init__(self) -> None:
        self.text = ""
        self.error: openai.APIError | None = None

    async def run(self, client: AsyncOpenAI, text: str, max_tokens: int) -> None:
        """Ask and read to the end."""
        try:
            chunks = await client.completions.create(prompt=text, max_tokens=max_tokens, stream=True, **OPTIONS)
            async for chunk in chunks:
                self.text += chunk.choices[0].text
        except openai.APIError as error:
            self.error = error


def kill_one(processes: list[psutil.Process]) -> None:
    assert len(processes) == NUM_REPLICAS
    processes[0].kill()


async def test_a_killed_replica_loses_no_request(deployment, ray_cluster, engine):
    prompts = [prompt(number) for number in range(48)]
    texts, _ = expected(engine, prompts, 80)
    streams = [Stream() for _ in prompts[:24]]
    async with client_of(deployment) as client:
        streaming = [
            asyncio.ensure_future(stream.run(client, text, 80)) for stream, text in zip(streams, prompts, strict=False)
        ]
        whole = await ask_many(client, prompts[24:], 80)
        async with asyncio.timeout(60):
            while sum(bool(stream.text) for stream in streams) < 18:
                await asyncio.sleep(0.01)
        kill_one(ray_cluster.processes(ENGINE_TITLE))
        await asyncio.gather(*streaming)
        assert await asyncio.gather(*whole) == texts[24:]  # nothing of them was sent yet: another engine answers
    broken = [stream for stream in streams if stream.error is not None]
    assert 0 < len(broken) < len(streams)
    for stream in broken:
        assert stream.text, "before the first token it would have been sent to another engine"
        assert (stream.error.code, stream.error.type) == ("engine_dead", "server_error")
        assert "send it again" in stream.error.message
    assert [s.text for s in streams if s.error is None] == [
        text for s, text in zip(streams, texts, strict=False) if s.error is None
    ]
    assert sum(samples(deployment, "jaxserve:replica_retries_total").values()) > 0


async def test_a_killed_engine_process_loses_no_request_either(deployment, ray_cluster, engine):
    # Serve may not have heard yet of the replica that was killed, and say that all run.
    wait_for(lambda: len(ray_cluster.processes(ENGINE_TITLE)) == NUM_REPLICAS, 90, "a new replica's process")
    wait_for(lambda: ready(deployment)["detail"] == f"engines: {NUM_REPLICAS} running", 90, "a new replica")
    prompts = [prompt(number) for number in range(24)]
    texts, _ = expected(engine, prompts, 60)
    replicas = ray_cluster.processes(ENGINE_TITLE)
    async with client_of(deployment) as client:
        whole = await ask_many(client, prompts, 60)
        await asyncio.sleep(0.3)
        kill_one([replica.children()[0] for replica in replicas])
        assert await asyncio.gather(*whole) == texts


def ready(server: ServerProcess) -> dict[str, Any]:
    """What /ready says."""
    return httpx.get(f"{server.url}/ready", timeout=30).json()


def test_a_signal_lets_running_requests_end_and_takes_the_deployment_away(deployment, ray_cluster):
    body = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "n": 32, "stream": True}
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        deployment.terminate()
        wait_for(lambda: httpx.get(f"{deployment.url}/ready").status_code == 503, 10, "the draining")
        refused = httpx.post(f"{deployment.url}/v1/completions", json={"prompt": "abc"}, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        reasons = Counter(
            choice["finish_reason"] for line in rest[:-1] for choice in json.loads(line[len("data: ") :])["choices"]
        )
        assert reasons["length"] == 32
    begin_s = time.monotonic()
    assert deployment.process.wait(60) == 0
    assert time.monotonic() - begin_s < 30
    assert ray_cluster.processes(ENGINE_TITLE) == []
