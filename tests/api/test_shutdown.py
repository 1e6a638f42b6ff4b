"""The end of a server: new requests are refused, running ones finish or are told, a second signal ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from jaxserve.config import ServerSettings
from tests.api.live_server import running
from tests.fakes import FakeEngine

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def http():
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def test_running_requests_finish_and_new_ones_are_refused(http: httpx.Client, eventually) -> None:
    config = ServerSettings(port=0, shutdown_timeout_s=10)
    with running(FakeEngine(step_s=0.08), config) as live, ThreadPoolExecutor() as pool:
        url = f"{live.url}/v1/chat/completions"
        whole = pool.submit(httpx.post, url, json={"messages": USER}, trust_env=False, timeout=20)
        eventually(lambda: len(live.engine.running) == 1)
        assert http.get(f"{live.url}/ready").status_code == 200
        live.begin_shutdown()
        eventually(lambda: live.server._state.in_flight.is_draining)
        refused = http.post(url, json={"messages": USER})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_draining"
        ready = http.get(f"{live.url}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert whole.result().json()["choices"][0]["finish_reason"] == "stop"
        eventually(lambda: live.server.should_exit)
        assert not live.engine.aborted


def test_requests_that_do_not_finish_in_time_are_aborted_and_told(http: httpx.Client, eventually) -> None:
    config = ServerSettings(port=0, shutdown_timeout_s=0.1)
    with running(FakeEngine(step_s=0.2, scores_prompt_late=True), config) as live, ThreadPoolExecutor() as pool:
        url = f"{live.url}/v1/chat/completions"
        whole = pool.submit(httpx.post, url, json={"messages": USER}, trust_env=False, timeout=20)
        stream = pool.submit(httpx.post, url, json={"messages": USER, "stream": True}, trust_env=False, timeout=20)
        scored = {"prompt": "a", "stream": True, "echo": True, "logprobs": 1}
        scores = pool.submit(httpx.post, f"{live.url}/v1/completions", json=scored, trust_env=False, timeout=20)
        eventually(lambda: len(live.engine.running) == 3)
        time.sleep(0.3)
        live.begin_shutdown()
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "request_aborted"
        assert '"request_aborted"' in stream.result().text
        assert "[DONE]" not in stream.result().text
        assert (scores.result().status_code, scores.result().json()["error"]["code"]) == (503, "request_aborted")


SERVER = """
    import asyncio, sys
    from api.app import create_app
    from api.server import run, serve
    from jaxserve.config import ServerSettings
    from tests.fakes import FakeEngine

    async def drain():
        print("draining", flush=True)

    config = ServerSettings(port=0, shutdown_timeout_s=30)
    app = create_app(FakeEngine(step_s=float(sys.argv[1])), config)
    run(serve(app, config, on_started=lambda port: print(port, flush=True), on_drain=drain))
    print("ended", flush=True)
"""


@pytest.fixture
def start_server():
    processes = []

    def start(step_s: float) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SERVER), str(step_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        processes.append(process)
        assert process.stdout is not None
        return process, f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_drains_calls_the_hook_and_ends_well(start_server) -> None:
    process, url = start_server(0.05)
    answers = []
    body = {"messages": USER}
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False))
    )
    thread.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=15)
    thread.join()
    assert output.split() == ["draining", "ended"]
    assert process.returncode == 0
    assert answers[0].json()["choices"][0]["finish_reason"] == "stop"


def test_the_drain_hook_runs_on_an_idle_server_too(start_server) -> None:
    process, _ = start_server(0.0)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=15)
    assert output.split() == ["draining", "ended"]
    assert not errors


def test_a_second_signal_ends_at_once(start_server) -> None:
    process, url = start_server(60.0)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(
            httpx.post, f"{url}/v1/chat/completions", json={"messages": USER}, trust_env=False, timeout=20
        )
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "draining\n"
        start_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
        assert answer.result().json()["error"]["code"] == "request_aborted"
    assert process.returncode == 0
    assert time.monotonic() - start_s < 5
    assert "Traceback" not in errors
