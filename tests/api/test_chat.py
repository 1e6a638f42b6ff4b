"""POST /v1/chat/completions, not streamed: messages, the template, logprobs, and OpenAI's names of things."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from tests.fakes import FakeEngine, small_tokenizer

HELLO = "Hello world, how are you today?"
USER = [{"role": "user", "content": "Hi"}]


def chat(client: TestClient, messages=None, **fields):
    response = client.post("/v1/chat/completions", json={"messages": messages or USER} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: TestClient, messages=None, **fields):
    response = client.post("/v1/chat/completions", json={"messages": messages or USER} | fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_a_chat_has_openais_form(client: TestClient) -> None:
    body = chat(client)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": HELLO, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "seed": 7,
        }
    ]


def test_the_template_makes_the_prompt_and_its_special_tokens(client: TestClient, engine: FakeEngine) -> None:
    chat(client, [{"role": "system", "content": "Be kind."}, *USER])
    call = engine.calls[0]
    assert call.prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert call.add_special_tokens is False


def test_a_chat_may_fill_the_context_when_no_limit_is_given(client: TestClient, engine: FakeEngine) -> None:
    chat(client)
    assert engine.calls[0].params.max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_has_two_names(client: TestClient, engine: FakeEngine, name: str) -> None:
    chat(client, **{name: 3})
    assert engine.calls[0].params.max_tokens == 3


def test_two_different_limits_are_refused(client: TestClient) -> None:
    assert refused(client, max_tokens=3, max_completion_tokens=4)["param"] == "max_completion_tokens"


def test_text_parts_are_taken(client: TestClient, engine: FakeEngine) -> None:
    first = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": None}
    chat(client, [{"role": "user", "content": [first, {"type": "text", "text": "b"}]}])
    assert "user\na\nb<|im_end|>" in engine.calls[0].prompt


def test_images_are_refused_by_name(client: TestClient) -> None:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
    error = refused(client, [{"role": "user", "content": parts}])
    assert "image_url" in error["message"]
    assert error["param"] == "messages[0].content"


def test_a_final_message_can_be_continued(client: TestClient, engine: FakeEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once"}]
    chat(client, messages, add_generation_prompt=False, continue_final_message=True)
    assert engine.calls[0].prompt.endswith("<|im_start|>assistant\nOnce")


def test_echo_puts_the_continued_message_first(client: TestClient) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once. "}]
    body = chat(client, messages, add_generation_prompt=False, continue_final_message=True, echo=True)
    assert body["choices"][0]["message"]["content"] == "Once. " + HELLO


def test_continuing_and_beginning_a_message_exclude_each_other(client: TestClient) -> None:
    error = refused(client, add_generation_prompt=True, continue_final_message=True)
    assert error["param"] == "continue_final_message"


def test_template_variables_reach_the_template() -> None:
    template = "{{ messages[0]['content'] }}|{{ enable_thinking }}|{{ documents[0]['text'] }}|{{ reasoning_effort }}"
    engine = FakeEngine(tokenizer=small_tokenizer(chat_template=template))
    client = TestClient(create_app(engine, ServerSettings()))
    chat(
        client,
        chat_template_kwargs={"enable_thinking": False},
        documents=[{"text": "facts"}],
        reasoning_effort="low",
    )
    assert engine.calls[0].prompt == "Hi|False|facts|low"


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "tokenize", "add_generation_prompt"])
def test_template_variables_cannot_replace_the_renderers_own(client: TestClient, name: str) -> None:
    error = refused(client, chat_template_kwargs={name: True})
    assert error["param"] == "chat_template_kwargs"
    assert name in error["message"]


def test_a_long_conversation_is_rendered_like_a_short_one(client: TestClient, engine: FakeEngine) -> None:
    chat(client, [{"role": "user", "content": "a" * 100_000}], truncate_prompt_tokens=100)
    assert engine.calls[0].prompt.startswith("<|im_start|>user\na")


def test_a_model_without_a_template_refuses_chats() -> None:
    client = TestClient(create_app(FakeEngine(tokenizer=small_tokenizer(chat_template=None)), ServerSettings()))
    assert "no chat template" in refused(client)["message"]


def test_a_templates_own_complaint_reaches_the_client() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    client = TestClient(create_app(FakeEngine(tokenizer=small_tokenizer(chat_template=template)), ServerSettings()))
    assert "roles must alternate" in refused(client)["message"]


def test_logprobs_name_each_token_with_its_bytes_and_alternatives(client: TestClient) -> None:
    logprobs = chat(client, logprobs=True, top_logprobs=2, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs == {
        "content": [
            {
                "token": "He",
                "logprob": -0.25,
                "bytes": [72, 101],
                "top_logprobs": [
                    {"token": "He", "logprob": -0.25, "bytes": [72, 101]},
                    {"token": "!", "logprob": -1.0, "bytes": [33]},
                ],
            }
        ],
        "refusal": None,
    }


def test_logprobs_without_alternatives_are_allowed(client: TestClient) -> None:
    logprobs = chat(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["content"][0]["top_logprobs"] == []


def test_top_logprobs_need_logprobs(client: TestClient) -> None:
    assert refused(client, top_logprobs=2)["param"] == "top_logprobs"
    chat(client, top_logprobs=0)


def test_prompt_logprobs_and_token_ids_stand_beside_the_choices(client: TestClient, engine: FakeEngine) -> None:
    body = chat(client, prompt_logprobs=0, return_token_ids=True, max_tokens=2)
    prompt_token_ids = engine.tokenizer.encode(engine.calls[0].prompt, False)
    assert body["prompt_token_ids"] == prompt_token_ids
    assert len(body["prompt_logprobs"]) == len(prompt_token_ids)
    assert body["choices"][0]["token_ids"] == engine.tokenizer.encode("Hello", False)


def test_a_reply_can_be_sent_back_as_a_message(client: TestClient) -> None:
    message = chat(client)["choices"][0]["message"]
    chat(client, [*USER, message | {"tool_calls": None, "function_call": None, "audio": None}, *USER])
    chat(client, [*USER, {"role": "assistant", "content": None, "annotations": [], "refusal": None}, *USER])


def test_tools_are_refused_by_name_and_an_empty_list_with_any_choice_is_not(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for choice in ("auto", "none"):
        chat(client, tools=[], tool_choice=choice)
        assert refused(client, tools=[tool], tool_choice=choice)["param"] == "tools"


def test_past_tool_calls_reach_the_template_as_objects() -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.city if m.tool_calls }}{% endfor %}!"
    engine = FakeEngine(tokenizer=small_tokenizer(chat_template=template))
    client = TestClient(create_app(engine, ServerSettings()))
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    chat(
        client,
        [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
    )
    assert engine.calls[0].prompt == "Paris!"


UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "guided_decoding_backend": "outlines",
    "best_of": 2,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "logprob_token_ids": [1],
    "audio": {"voice": "alloy"},
    "modalities": ["text", "audio"],
    "chat_template": "{{ messages }}",
    "store": True,
    "service_tier": "flex",
    "prediction": {"type": "content"},
    "web_search_options": {},
    "verbosity": "high",
    "vllm_xargs": {"a": 1},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(client: TestClient, name: str) -> None:
    error = refused(client, **{name: UNSUPPORTED[name]})
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"


NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "modalities": ["text"],
    "store": False,
    "service_tier": "auto",
    "verbosity": "medium",
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_value_that_asks_for_nothing_is_accepted(client: TestClient, name: str) -> None:
    chat(client, **{name: NEUTRAL[name]})
