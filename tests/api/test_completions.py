"""POST /v1/completions, not streamed: prompts, echo, logprobs, usage, and what reaches the engine."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from tests.fakes import FakeEngine, small_tokenizer

HELLO = "Hello world, how are you today?"


def complete(client: TestClient, **fields):
    response = client.post("/v1/completions", json={"model": "fake"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_has_openais_form(client: TestClient) -> None:
    body = complete(client, prompt="One two", max_tokens=100)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "fake"
    assert body["system_fingerprint"] == "fp_fake"
    assert body["choices"] == [
        {"index": 0, "text": HELLO, "logprobs": None, "finish_reason": "stop", "stop_reason": None, "seed": 7}
    ]


def test_max_tokens_is_sixteen_when_left_out(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt="One")
    assert engine.calls[0].params.max_tokens == 16


def test_an_answer_cut_by_max_tokens_says_length(client: TestClient) -> None:
    choice = complete(client, prompt="One", max_tokens=2)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("One", ["One"]),
        (["One", "two"], ["One", "two"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(client: TestClient, engine: FakeEngine, prompt, expected):
    body = complete(client, prompt=prompt, max_tokens=1)
    assert sorted(call.prompt for call in engine.calls) == sorted(expected)
    assert len(body["choices"]) == len(expected)


def test_choices_stand_prompt_by_prompt(client: TestClient) -> None:
    body = complete(client, prompt=["One", "two"], n=2, max_tokens=100)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in body["choices"]] == ["0:", "1:", "0:", "1:"]


def test_each_choice_names_its_seed(client: TestClient) -> None:
    body = complete(client, prompt="One", n=2, seed=40)
    assert [choice["seed"] for choice in body["choices"]] == [40, 41]


def test_usage_counts_each_prompt_once_and_names_cached_tokens() -> None:
    client = TestClient(create_app(FakeEngine(num_cached_tokens=1), ServerSettings()))
    usage = complete(client, prompt=[[5, 6, 7], [8, 9]], n=2, max_tokens=3)["usage"]
    assert usage == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_logprobs_have_four_lists_of_one_entry_a_token(client: TestClient) -> None:
    logprobs = complete(client, prompt="One", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 2, 5],
        "token_logprobs": [-0.25, -0.25, -0.25],
        "tokens": ["He", "llo", " wor"],
        "top_logprobs": [{"He": -0.25, "!": -1.0}, {"llo": -0.25, "!": -1.0}, {" wor": -0.25, "!": -1.0}],
    }


def test_logprobs_zero_gives_the_chosen_token_alone(client: TestClient) -> None:
    logprobs = complete(client, prompt="One", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"He": -0.25}]


def test_tokens_can_be_named_by_id(client: TestClient, engine: FakeEngine) -> None:
    logprobs = complete(client, prompt="One", max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)["choices"][0][
        "logprobs"
    ]
    token_id = engine.tokenizer.encode("He", False)[0]
    assert logprobs["tokens"] == [f"token_id:{token_id}"]
    assert logprobs["top_logprobs"] == [{f"token_id:{token_id}": -0.25}]


def test_a_token_that_is_no_text_is_named_by_its_bytes(engine: FakeEngine) -> None:
    client = TestClient(create_app(FakeEngine(answer="€"), ServerSettings()))
    logprobs = complete(client, prompt="One", logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert [set(top) for top in logprobs["top_logprobs"]] == [{token} for token in logprobs["tokens"]]


def test_echo_puts_the_prompt_first_with_its_logprobs(client: TestClient) -> None:
    choice = complete(client, prompt="Hello", max_tokens=1, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == "HelloHe"
    assert choice["logprobs"]["tokens"] == ["He", "llo", "He"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
    assert choice["logprobs"]["text_offset"] == [0, 2, 5]


def test_echo_of_token_ids_gives_their_text(client: TestClient, engine: FakeEngine) -> None:
    prompt = engine.tokenizer.encode("One two", False)
    assert complete(client, prompt=prompt, max_tokens=1, echo=True)["choices"][0]["text"] == "One twoHe"


def test_echo_with_max_tokens_zero_scores_the_prompt_alone(client: TestClient) -> None:
    body = complete(client, prompt="Hello", max_tokens=0, echo=True, logprobs=1)
    assert body["choices"][0]["text"] == "Hello"
    assert body["choices"][0]["logprobs"]["tokens"] == ["He", "llo"]
    assert body["usage"]["completion_tokens"] == 0


def test_offsets_of_an_echoed_prompt_skip_a_bos_token_that_the_text_does_not_show() -> None:
    client = TestClient(create_app(FakeEngine(tokenizer=small_tokenizer(adds_bos=True)), ServerSettings()))
    logprobs = complete(client, prompt="Hello", max_tokens=1, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<s>", "He", "llo", "He"]
    assert logprobs["text_offset"] == [0, 0, 2, 5]


def test_an_empty_prompt_is_taken_when_the_tokenizer_begins_the_text_itself() -> None:
    client = TestClient(create_app(FakeEngine(tokenizer=small_tokenizer(adds_bos=True)), ServerSettings()))
    assert complete(client, prompt="", max_tokens=1)["choices"][0]["text"] == "He"
    refused = client.post("/v1/completions", json={"prompt": "", "add_special_tokens": False})
    assert refused.status_code == 400


def test_prompt_logprobs_have_vllms_form(client: TestClient, engine: FakeEngine) -> None:
    first, second = engine.tokenizer.encode("Hello", False)
    choice = complete(client, prompt=[first, second], max_tokens=1, prompt_logprobs=2)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {
        str(second): {"logprob": -0.25, "rank": 1, "decoded_token": "llo"},
        "4": {"logprob": -1.0, "rank": 2, "decoded_token": "!"},
    }


def test_token_ids_come_back_when_asked_for(client: TestClient, engine: FakeEngine) -> None:
    choice = complete(client, prompt=[5, 6], max_tokens=2, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == engine.tokenizer.encode("Hello", False)


def test_every_sampling_field_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "allowed_token_ids": [1, 2], "bad_words": ["no"],
        "seed": 5, "max_tokens": 4, "min_tokens": 1, "stop_token_ids": [9], "include_stop_str_in_output": True,
        "ignore_eos": True, "logprobs": 1, "skip_special_tokens": False, "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": 8,
    }  # fmt: skip
    complete(
        client,
        prompt="One",
        stop="end",
        logit_bias={"7": -1},
        priority=3,
        cache_salt="mine",
        add_special_tokens=False,
        **fields,
    )
    call = engine.calls[0]
    assert {name: getattr(call.params, name) for name in fields} == fields
    assert call.params.stop == ["end"]
    assert call.params.logit_bias == {7: -1}
    assert (call.priority, call.cache_salt, call.add_special_tokens) == (3, "mine", False)
    assert call.params.output_kind == "final_only"


def test_the_models_generation_config_fills_in_what_a_request_leaves_out() -> None:
    engine = FakeEngine(default_sampling={"temperature": 0.6, "top_k": 20})
    client = TestClient(create_app(engine, ServerSettings()))
    complete(client, prompt="One", top_k=5)
    assert engine.calls[0].params.temperature == 0.6
    assert engine.calls[0].params.top_k == 5
    assert engine.calls[0].params.top_p == 1.0


def test_truncating_to_minus_one_leaves_room_for_the_answer(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt=[5] * 3000, truncate_prompt_tokens=-1, max_tokens=24)
    assert engine.calls[0].params.truncate_prompt_tokens == 1000


def test_null_means_not_given(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt="One", temperature=None, stop=None, logprobs=None, max_tokens=None, n=None)
    assert engine.calls[0].params.temperature == 1.0


def test_notes_for_accounting_and_routing_change_nothing(client: TestClient) -> None:
    complete(
        client, prompt="One", user="u", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="k", best_of=1
    )


def test_the_same_request_id_twice_gives_the_engine_two_ids(client: TestClient, engine: FakeEngine) -> None:
    first = complete(client, prompt="One", request_id="mine")
    second = complete(client, prompt="One", request_id="mine")
    assert first["id"] == second["id"] == "cmpl-mine"
    assert len({call.request_id for call in engine.calls}) == 2


def test_an_alias_of_the_model_is_answered_under_its_first_name(client: TestClient) -> None:
    assert complete(client, model="org/fake-alias", prompt="One")["model"] == "fake"
