"""Who may call, and how much they may send: API keys, CORS, body size, request ids."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.protocol import Protocol
from jaxserve.config import ServerSettings
from tests.api.live_server import Running, running
from tests.fakes import FakeEngine

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
    ("GET", "//health"),
    ("GET", "/health/"),
]


@pytest.fixture
def guarded() -> TestClient:
    return TestClient(create_app(FakeEngine(), ServerSettings(api_key=("first", "sécond"))))


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(guarded: TestClient, method: str, path: str) -> None:
    response = guarded.request(method, f"http://testserver{path}")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_health_and_ping_need_no_key(guarded: TestClient) -> None:
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/ping").status_code == 200


@pytest.mark.parametrize("key", ["first", "sécond"])
def test_any_of_the_keys_opens(guarded: TestClient, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".encode()}
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "value", ["Bearer wrong", "Bearer", "Bearer ", "first", "Basic first", "Bearer first second", ""]
)
def test_anything_else_does_not(guarded: TestClient, value: str) -> None:
    assert guarded.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_a_key_is_checked_under_a_proxys_prefix_too() -> None:
    app = create_app(FakeEngine(), ServerSettings(api_key=("first",), root_path="/llm"))
    client = TestClient(app, root_path="/llm")
    assert client.get("/llm/health").status_code == 200
    assert client.get("/llm/v1/models").status_code == 401


def test_a_body_with_too_large_a_length_is_refused_unread() -> None:
    client = TestClient(create_app(FakeEngine(), ServerSettings(max_body_bytes=1024)))
    response = client.post("/v1/completions", json={"prompt": "a" * 2000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_body_in_chunks_is_counted_as_it_comes() -> None:
    client = TestClient(create_app(FakeEngine(), ServerSettings(max_body_bytes=1024)))
    parts = iter([b'{"prompt": "', *[b"a" * 100] * 20, b'"}'])
    response = client.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_a_body_of_just_the_limit_is_taken() -> None:
    client = TestClient(create_app(FakeEngine(), ServerSettings(max_body_bytes=1024)))
    body = b'{"max_tokens": 1, "prompt": "' + b"a" * 100 + b'"}'
    body += b" " * (1024 - len(body))
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, b"\x16\x03\x01 what\r\n\r\n"])
def test_a_head_without_end_or_sense_closes_the_connection(live: Running, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(data)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "data", [b"", b"GET /health HTTP/1.1\r\nX: y", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"]
)
def test_a_client_that_does_not_finish_its_head_is_cut_off(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(Protocol, "head_timeout_s", 0.2)
    with running(FakeEngine()) as live, socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.count(b"HTTP/1.1 200") == data.count(b"\r\n\r\n")


def test_a_slow_answer_is_not_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(Protocol, "head_timeout_s", 0.2)
    with running(FakeEngine(step_s=0.3)) as live:
        body = {"prompt": "a", "max_tokens": 2}
        assert httpx.post(f"{live.url}/v1/completions", json=body, trust_env=False).status_code == 200


def test_browsers_of_an_allowed_origin_may_call() -> None:
    config = ServerSettings(api_key=("first",), allowed_origins=("https://app.example",))
    client = TestClient(create_app(FakeEngine(), config))
    preflight = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = client.options("/v1/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    refused = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_without_allowed_origins_no_browser_is_let_in(client: TestClient) -> None:
    response = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_clients_request_id_comes_back_in_header_and_reply(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "trace-1"})
    assert response.headers["x-request-id"] == "trace-1"
    assert response.json()["id"] == "cmpl-trace-1"


@pytest.mark.parametrize("given", ["", "two words", "x" * 200, "bad\u00e9".encode("latin-1")])
def test_an_unfit_request_id_is_replaced(client: TestClient, given) -> None:
    response = client.get("/version", headers={"x-request-id": given})
    assert len(response.headers["x-request-id"]) == 32
