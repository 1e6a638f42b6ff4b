"""A server with two keys, and random weights: every route but /health and /ping needs one of them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from tests.e2e.server import ServerProcess
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.quick_compiles import QUICK_COMPILES

KEYS = ("first-key", "second key with spaces")
OPEN = [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")]
CLOSED = [
    *(("GET", path) for path in ("/ready", "/version", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny")),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
    *(("GET", path) for path in ("/", "/nothing", "/health/", "/health/x", "//health", "/Health", "/metrics/")),
    ("OPTIONS", "/v1/models"),
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("keyed")
    model = write_config(folder / "tiny")
    flags = ["--load-format", "dummy", "--served-model-name", "tiny", "--enable-log-requests", "--log-level", "debug"]
    for key in KEYS:
        flags += ["--api-key", key]
    with ServerProcess(folder / "log", str(model), *TINY_SHAPES, *flags, env=QUICK_COMPILES) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_a_route_is_closed_without_a_key_and_open_with_either(keyed, method, path):
    for wrong in (None, "", "Bearer", "Bearer no", f"Bearer {KEYS[0]}x", KEYS[0], f"Basic {KEYS[0]}"):
        reply = httpx.request(method, keyed.url + path, headers={} if wrong is None else {"Authorization": wrong})
        assert reply.status_code == 401, (wrong, reply.text)
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert not [key for key in KEYS if key in reply.text]
    for key in KEYS:
        reply = httpx.request(method, keyed.url + path, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code in (200, 400, 404, 405, 415), reply.text


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_health_checks_need_no_key(keyed, method, path):
    assert httpx.request(method, keyed.url + path).status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_openai_answers_with_either_key(keyed, key):
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(model="tiny", prompt="abc", max_tokens=5, extra_body=extra)
    assert len(answer.choices[0].token_ids) == 5


def test_openai_raises_its_own_error_for_a_wrong_key(keyed):
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_model_without_a_chat_template_says_so(keyed):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    reply = httpx.post(f"{keyed.url}/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 400
    assert "no chat template" in reply.json()["error"]["message"]


def test_the_keys_are_in_no_log_and_not_in_the_engine(keyed: ServerProcess):
    text = keyed.log.read_text()
    assert [key for key in KEYS if key in text] == []
    for process in keyed.descendants():
        assert isinstance(process, psutil.Process)
        told = " ".join(process.cmdline()) + " ".join(process.environ().values())
        assert [key for key in KEYS if key in told] == []
