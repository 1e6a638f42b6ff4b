"""A client that hangs up: the engine is told, streaming or not, and nothing of the request is left."""

from __future__ import annotations

import json
import socket

import pytest

from jaxserve.config import ServerSettings
from tests.api.live_server import running
from tests.fakes import FakeEngine

USER = [{"role": "user", "content": "Hi"}]


def head(path: str, num_bytes: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {num_bytes}"]
    return "\r\n".join([*lines, "", ""]).encode()


def connect(port: int, path: str, **fields) -> socket.socket:
    body = json.dumps(fields).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head(path, len(body)) + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "One", "max_tokens": 50}),
        ("/v1/completions", {"prompt": ["One", "two"], "max_tokens": 50}),
    ],
    ids=["chat", "one prompt", "two prompts"],
)
def test_hanging_up_aborts_every_request_of_the_call(body, stream: bool, eventually) -> None:
    path, fields = body
    num_prompts = 2 if isinstance(fields.get("prompt"), list) else 1
    with running(FakeEngine(step_s=0.1)) as live:
        connection = connect(live.port, path, stream=stream, **fields)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: len(live.engine.running) == num_prompts)
        connection.close()
        eventually(lambda: len(live.engine.aborted) == num_prompts)
        assert not live.engine.running
        eventually(lambda: not live.server._state.in_flight.num_http)
        assert not live.server._state.in_flight.request_ids


def test_hanging_up_before_the_first_token_aborts_too(eventually) -> None:
    with running(FakeEngine(step_s=5)) as live:
        connection = connect(live.port, "/v1/chat/completions", messages=USER, stream=True)
        eventually(lambda: len(live.engine.running) == 1)
        connection.close()
        eventually(lambda: len(live.engine.aborted) == 1)


def test_hanging_up_while_sending_the_body_leaves_nothing(eventually) -> None:
    with running(FakeEngine()) as live:
        connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
        connection.sendall(head("/v1/completions", 1000) + b"{")
        eventually(lambda: live.server._state.in_flight.num_http == 1)
        connection.close()
        eventually(lambda: live.server._state.in_flight.num_http == 0)
        assert not live.engine.calls


def test_a_body_that_does_not_arrive_in_time_ends_the_connection() -> None:
    config = ServerSettings(port=0, shutdown_timeout_s=0, body_timeout_s=0.3)
    with running(FakeEngine(), config) as live:
        connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
        connection.sendall(head("/v1/completions", 1000) + b'{"model": "fa')
        reply = b"".join(iter(lambda: connection.recv(65536), b""))  # to its end: the server hangs up
        connection.close()
        assert reply.startswith(b"HTTP/1.1 408")
        error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "body_timeout"
        assert "did not arrive within 0.3 s" in error["message"]


def test_an_answer_may_take_longer_than_a_body() -> None:
    config = ServerSettings(port=0, shutdown_timeout_s=0, body_timeout_s=0.2)
    with running(FakeEngine(step_s=0.15), config) as live:
        connection = connect(live.port, "/v1/completions", prompt="a", max_tokens=4)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()


def test_an_answer_that_ended_aborts_nothing() -> None:
    with running(FakeEngine()) as live:
        for stream in (True, False):
            with connect(live.port, "/v1/chat/completions", messages=USER, stream=stream) as connection:
                data = b""
                while not data.endswith((b"0\r\n\r\n", b"}")):
                    data += connection.recv(65536)
        assert len(live.engine.calls) == 2
        assert not live.engine.aborted
