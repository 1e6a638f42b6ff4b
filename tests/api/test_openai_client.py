"""The real `openai` client against a real socket."""

from __future__ import annotations

import asyncio

import openai
import pytest

from jaxserve.config import ServerSettings
from jaxserve.errors import EngineDeadError
from tests.api.live_server import Running, running
from tests.fakes import FakeEngine

HELLO = "Hello world, how are you today?"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def ai(live: Running):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in answer.choices] == [f"0: {HELLO}", f"1: {HELLO}"]
    assert answer.choices[0].logprobs.content[0].token == "0"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[1].seed == 8  # an extra field of ours


def test_chat_stream_with_usage(ai: openai.OpenAI) -> None:
    stream = ai.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == HELLO
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(chunks) - 2


def test_the_clients_stream_helper(ai: openai.OpenAI) -> None:
    with ai.chat.completions.stream(model="fake", messages=USER) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == HELLO


def test_completions_whole_and_streamed(ai: openai.OpenAI) -> None:
    fields = {"model": "fake", "prompt": ["One", "two"], "max_tokens": 50, "logprobs": 1}
    whole = ai.completions.create(**fields)
    texts = ["", ""]
    for chunk in ai.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == texts == [HELLO, HELLO]


def test_vllms_fields_go_through_extra_body(ai: openai.OpenAI, live: Running) -> None:
    ai.completions.create(model="fake", prompt="One", extra_body={"top_k": 4, "min_p": 0.1})
    assert live.engine.calls[-1].params.top_k == 4


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["fake", "org/fake-alias"]
    assert ai.models.retrieve("org/fake-alias").id == "org/fake-alias"


def test_errors_arrive_as_the_clients_own(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        ai.chat.completions.create(model="gpt-4", messages=USER)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad_request:
        ai.chat.completions.create(model="fake", messages=USER, temperature=-1)
    assert bad_request.value.param == "temperature"


def test_a_wrong_key_is_an_authentication_error() -> None:
    config = ServerSettings(port=0, api_key=("right",), shutdown_timeout_s=0)
    with running(FakeEngine(), config) as live:
        with (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="right", max_retries=0) as client:
            assert client.models.list().data


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    with (
        running(FakeEngine(error=EngineDeadError(), error_after=3)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="engine stopped"),
    ):
        list(client.chat.completions.create(model="fake", messages=USER, stream=True))


async def test_leaving_an_async_stream_aborts(eventually) -> None:
    with running(FakeEngine(step_s=0.1)) as live:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
            async for _ in stream:
                break
            await stream.close()
            await asyncio.to_thread(eventually, lambda: len(live.engine.aborted) == 1)
