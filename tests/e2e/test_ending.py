"""Last of all on the shared server: nothing was compiled late, the engine dies and comes back, SIGTERM drains.

The tests of this file build on each other in their order; `conftest.py` runs them after all others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.server import NAME, ServerProcess, wait_for

LONG: dict[str, Any] = {
    "model": NAME,
    "prompt": "Once upon a time",
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
RESTART_TIMEOUT_S = 120.0


class Background:
    """Runs a function in a thread and keeps what it gave or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - the test reads it
            self.error = error

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()


def test_nothing_was_compiled_while_serving_and_nothing_is_left(server, client):
    client.completions.create(**LONG, max_tokens=2)
    assert server.metric("generation_tokens_total") > 0
    assert server.metric("compiles_after_ready_total") == 0
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("engine_restarts_total") == 0


def test_the_log_holds_no_traceback_and_no_error(server):
    text = server.log.read_text()
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if " ERROR " in line] == []


def test_an_engine_that_is_killed_is_started_again(server, client, http):
    before = client.completions.create(**LONG, max_tokens=8).choices[0].text
    engine = server.engine()
    whole = Background(lambda: client.completions.create(**LONG, max_tokens=300))
    stream = client.completions.create(**LONG, max_tokens=300, stream=True)
    assert next(iter(stream)).choices[0].text
    wait_for(lambda: server.metric("num_requests_running") == 2, 20, "both requests running")

    engine.kill()
    killed_s = time.monotonic()
    with pytest.raises(openai.APIError) as cut:
        list(stream)
    assert_server_error(cut.value.body)
    whole.join(10)
    assert isinstance(whole.error, openai.InternalServerError)
    assert whole.error.status_code == 503
    assert_server_error(whole.error.body)
    assert time.monotonic() - killed_s < 5

    not_ready = http.get("/ready")
    assert (not_ready.status_code, not_ready.json()["status"]) == (503, "restarting")
    health = http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "restarting"})  # it is coming back by itself
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**LONG, max_tokens=1)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert_server_error(refused.value.body)
    assert http.get("/v1/models").status_code == http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert server.metric("num_requests_running") == 0

    wait_for(lambda: http.get("/ready").status_code == 200, RESTART_TIMEOUT_S, "the engine's return")
    assert http.get("/ready").json()["num_restarts"] == 1
    assert server.metric("engine_restarts_total") == 1
    assert client.completions.create(**LONG, max_tokens=8).choices[0].text == before
    assert server.metric("compiles_after_ready_total") == 0


def assert_server_error(body: Any) -> None:
    """`body` is OpenAI's error object, and says that it was not the client's fault."""
    assert body["type"] == "server_error"
    assert "engine" in body["message"]


def test_sigterm_lets_a_stream_finish_refuses_new_requests_and_leaves_no_process(server, client, http):
    num_tokens = 40
    processes = [psutil.Process(server.process.pid), *server.descendants()]
    stream = iter(client.completions.create(**LONG, max_tokens=num_tokens, stream=True))
    chunks = [next(stream)]
    server.terminate()
    wait_for(lambda: http.get("/ready").status_code == 503, 5, "the server's draining")
    assert http.get("/ready").json()["status"] == "draining"
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**LONG, max_tokens=1)
    assert (refused.value.status_code, refused.value.code) == (503, "server_draining")

    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len("".join(chunk.choices[0].text for chunk in chunks)) > num_tokens
    assert server.process.wait(20) == 0, server.log.read_text()
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    with pytest.raises(httpx.TransportError):
        http.get("/health")
    assert "Traceback" not in server.log.read_text()


def test_a_drained_server_ended_well_and_leaked_nothing(server: ServerProcess):
    assert server.process.returncode == 0
    leaked = [line for line in server.log.read_text().splitlines() if "leaked" in line or "Exception ignored" in line]
    assert leaked == []
