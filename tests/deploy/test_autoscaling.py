"""Engines come with load and go without, and a dead one is replaced; the engines are fakes, the cluster is real."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from jaxserve.config import config_from_values
from tests.deploy.test_replicas import ENGINE_TITLE, Stream, client_of, ready, samples
from tests.e2e.server import ServerProcess, wait_for

TARGET = 2  # requests an engine
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 0.5, 1.0
DEPLOY = """
import sys
from jaxserve.cli.deploy import run_deployment
from jaxserve.config import load_config
run_deployment(load_config(sys.argv[1], environ={}), core="tests.engine.fake_core:FakeCore")
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: until it is there, answers stop after three tokens."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def autoscaled(ray_cluster, model_dir, gate, tmp_path_factory) -> Iterator[ServerProcess]:
    """One engine, two at most; a replica starts its engine again once, then Serve replaces it."""
    folder = tmp_path_factory.mktemp("autoscaled")
    config = config_from_values(
        {
            "model": model_dir,
            "served_model_name": "tiny",
            "device": "cpu",
            "port": 0,
            "ray_address": ray_cluster.address,
            "num_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": TARGET,
            "max_ongoing_requests": TARGET,  # more wait in the API server
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
            "health_check_period_s": 0.5,
            "max_num_engine_restarts": 1,
        }
    ).with_values(hf_overrides={"gate": str(gate)})
    launch_file = folder / "launch.yaml"
    launch_file.write_text(config.model_dump_json())
    with ServerProcess(folder / "log", run=[sys.executable, "-c", DEPLOY, str(launch_file)]) as running:
        yield running
        running.terminate()
        assert running.process.wait(60) == 0


@pytest.fixture
def engines(autoscaled, ray_cluster) -> Any:
    """The engine processes that run."""

    def find() -> list[psutil.Process]:
        return [engine for replica in ray_cluster.processes(ENGINE_TITLE) for engine in replica.children()]

    return find


def detail(server: ServerProcess) -> str:
    return ready(server)["detail"]


def taken(server: ServerProcess) -> dict[str, float]:
    """Requests by the replica that took them."""
    return samples(server, "jaxserve:replica_requests_total")


async def test_load_brings_an_engine_and_its_end_takes_it_away_without_breaking_a_stream(autoscaled, gate, engines):
    """
    # streams    2 on the first engine, 2 wait | 2 on each | 1 on the second, 1 new on the first | both end whole
    # engines    1                             | 2         | 2, the second leaving               | 1
    """
    prompt, num_tokens = "abcdefg", 100
    streams = [Stream() for _ in range(2 * TARGET + 1)]
    async with client_of(autoscaled) as client, AsyncExitStack() as leaving:

        async def until(condition: Callable[[], object], what: str) -> Any:
            return await asyncio.to_thread(wait_for, condition, 60, what)

        def ask(number: int) -> asyncio.Task[None]:
            task = asyncio.ensure_future(streams[number].run(client, f"{number}{prompt}", num_tokens))
            leaving.callback(task.cancel)
            return task

        def begun() -> set[int]:
            return {number for number, stream in enumerate(streams) if stream.text}

        (first,) = samples(autoscaled, "jaxserve:num_requests_running")
        tasks = [ask(number) for number in range(2 * TARGET)]
        on_first = await until(lambda: len(found := begun()) == TARGET and found, "what one engine takes")
        await until(lambda: len(begun()) == 2 * TARGET, "a second engine, and its answers to those that waited")
        await until(lambda: detail(autoscaled) == "engines: 2 running", "the news of it")
        assert list(taken(autoscaled).values()) == [TARGET, TARGET]

        kept, new = max(begun() - on_first), 2 * TARGET
        gone_s = time.monotonic()
        for number in begun() - {kept}:
            tasks[number].cancel()
        await until(lambda: detail(autoscaled) == "engines: 1 running, 1 stopping", "an engine that leaves")
        assert time.monotonic() - gone_s >= DOWNSCALE_DELAY_S
        assert len(engines()) == 2

        tasks.append(ask(new))
        await until(lambda: streams[new].text, "an answer of the engine that stays")
        assert taken(autoscaled)[first] == TARGET + 1
        gate.touch()
        await asyncio.gather(tasks[kept], tasks[new])
    for number in (kept, new):
        assert (streams[number].error, streams[number].text) == (None, (f"{number}{prompt}" * num_tokens)[:num_tokens])
    wait_for(lambda: detail(autoscaled) == "engines: 1 running" and len(engines()) == 1, 30, "the end of the other one")


async def test_an_engine_with_all_places_taken_is_in_the_metrics(autoscaled, gate):
    gate.unlink(missing_ok=True)

    def running() -> list[float]:
        return list(samples(autoscaled, "jaxserve:num_requests_running").values())

    async with client_of(autoscaled) as client, AsyncExitStack() as leaving:
        streams = [Stream() for _ in range(TARGET)]
        for stream in streams:
            leaving.callback(asyncio.ensure_future(stream.run(client, "abc", 100)).cancel)
        await asyncio.to_thread(wait_for, lambda: all(stream.text for stream in streams), 60, "their first tokens")
        await asyncio.to_thread(wait_for, lambda: running() == [TARGET], 30, "the full engine's metrics")
    await asyncio.to_thread(wait_for, lambda: running() == [0], 30, "the news that they left")


def test_a_dead_engine_is_started_again_and_its_replica_replaced_when_that_was_the_last_time(
    autoscaled, ray_cluster, gate, engines
):
    gate.touch()

    def answer() -> str | None:
        body = {"prompt": "abc", "max_tokens": 5, "temperature": 0.0}
        reply = httpx.post(f"{autoscaled.url}/v1/completions", json=body, timeout=60)
        return reply.json()["choices"][0]["text"] if reply.status_code == 200 else None

    def replica() -> int:
        (process,) = ray_cluster.processes(ENGINE_TITLE)
        return process.pid

    assert answer() == "abcab"
    first_replica, (first,) = replica(), engines()
    first.kill()
    wait_for(lambda: any(engine.pid != first.pid for engine in engines()), 30, "an engine of the same replica")
    assert wait_for(answer, 30, "its answer") == "abcab"
    assert replica() == first_replica

    (second,) = engines()
    second.kill()
    wait_for(lambda: httpx.get(f"{autoscaled.url}/ready", timeout=30).status_code == 503, 30, "the health check")
    wait_for(lambda: httpx.get(f"{autoscaled.url}/ready", timeout=30).status_code == 200, 60, "a new replica")
    assert wait_for(answer, 30, "its answer") == "abcab"
    assert replica() != first_replica
