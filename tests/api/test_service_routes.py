"""The routes beside generation: models, tokens, health, metrics, the OpenAPI description."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from jaxserve.engine.client import EngineHealth, EngineState
from jaxserve.metrics import ServerMetrics
from tests.fakes import FakeEngine, small_tokenizer


def test_models_lists_every_served_name(client: TestClient) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake", "org/fake-alias"]
    assert body["data"][0]["max_model_len"] == 1024


def test_a_model_whose_name_has_a_slash_is_found(client: TestClient) -> None:
    assert client.get("/v1/models/org/fake-alias").json()["id"] == "org/fake-alias"
    assert client.get("/v1/models/org%2Ffake-alias").json()["id"] == "org/fake-alias"
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_tokenize_a_prompt(client: TestClient, engine: FakeEngine) -> None:
    body = client.post("/tokenize", json={"model": "fake", "prompt": "Hello", "return_token_strs": True}).json()
    token_ids = engine.tokenizer.encode("Hello")
    assert body == {"count": 2, "max_model_len": 1024, "tokens": token_ids, "token_strs": ["He", "llo"]}


def test_tokenize_adds_special_tokens_unless_told_not_to() -> None:
    client = TestClient(create_app(FakeEngine(tokenizer=small_tokenizer(adds_bos=True)), ServerSettings()))
    assert client.post("/tokenize", json={"prompt": "Hello"}).json()["count"] == 3
    assert client.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()["count"] == 2


def test_tokenize_a_conversation_gives_what_the_model_would_see(client: TestClient, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = client.post("/tokenize", json={"messages": messages}).json()
    client.post("/v1/chat/completions", json={"messages": messages})
    assert body["tokens"] == engine.tokenizer.encode(engine.calls[0].prompt, False)
    assert body["token_strs"] is None


def test_detokenize_is_tokenize_backwards(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": "Hello <|im_end|>é"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Hello <|im_end|>é"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
def test_wrong_bodies_are_refused_by_field(client: TestClient, path: str, body, param: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        (EngineState.STARTING, 200, 503),
        (EngineState.READY, 200, 200),
        (EngineState.RESTARTING, 200, 503),
        (EngineState.DRAINING, 200, 503),
        (EngineState.DEAD, 503, 503),
    ],
)
def test_health_asks_for_a_new_process_and_ready_for_work(state: EngineState, health: int, ready: int) -> None:
    engine = FakeEngine(health=EngineHealth(state=state, detail="why"))
    client = TestClient(create_app(engine, ServerSettings()))
    assert client.get("/health").status_code == health
    assert client.post("/ping").status_code == health
    response = client.get("/ready")
    assert response.status_code == ready
    assert response.json()["status"] == state.value
    assert response.json()["detail"] == "why"


def test_version_is_the_packages(client: TestClient) -> None:
    assert client.get("/version").json()["version"].count(".") >= 2


def test_metrics_count_requests_by_route_not_by_path() -> None:
    metrics = ServerMetrics(model_name="fake")
    client = TestClient(create_app(FakeEngine(), ServerSettings(), metrics=metrics))
    client.get("/v1/models/fake")
    client.get("/v1/models/other")
    client.get("/v1/some/scan")
    text = client.get("/metrics").text
    assert 'http_requests_total{handler="/v1/models/{id:path}",method="GET",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="/v1/models/{id:path}",method="GET",status="4xx"} 1.0' in text
    assert 'handler="none",method="GET",status="4xx"' in text
    assert "scan" not in text


def test_openapi_describes_every_route(client: TestClient) -> None:
    body = client.get("/openapi.json").json()
    described = {path.replace("{id}", "{id:path}") for path in body["paths"]} | {"/openapi.json"}
    assert described == {route.path for route in client.app.routes}
    schema = body["components"]["schemas"]["ChatRequest"]
    assert "temperature" in schema["properties"]
    assert "messages" in schema["required"]


@pytest.mark.parametrize("stream", [True, False])
def test_the_log_names_sizes_and_parameters_but_never_the_text(stream: bool, caplog) -> None:
    client = TestClient(create_app(FakeEngine(), ServerSettings(enable_log_requests=True)))
    body = {"messages": [{"role": "user", "content": "my secret"}], "stop": "secret too", "max_tokens": 3}
    with caplog.at_level("INFO", logger="api"):
        client.post("/v1/chat/completions", json=body | {"stream": stream, "request_id": "r1"})
    assert "chatcmpl-r1 /v1/chat/completions: 1 prompts, {" in caplog.text
    assert "'max_tokens': 3" in caplog.text
    assert ("and 3 tokens" if stream else "with 3 tokens") in caplog.text
    assert "secret" not in caplog.text
