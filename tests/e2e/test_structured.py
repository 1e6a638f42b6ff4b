"""Structured outputs with OpenAI's own client and a real model: answers parse; evil schemas hurt nobody."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pydantic
import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.server import NAME, ROOT

CITY: Any = [{"role": "user", "content": "Describe a city as JSON with its name, population and climate."}]


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=30)
    population: int = pydantic.Field(ge=0, le=100_000_000)
    climate: Literal["mild", "hot", "cold"]


FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": City.model_json_schema(), "strict": True},
}


def answer(client: OpenAI, **fields: Any) -> str:
    reply = client.chat.completions.create(
        **({"model": NAME, "messages": CITY, "temperature": 0, "max_tokens": 120} | fields)
    )
    assert reply.choices[0].finish_reason == "stop"
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 4}, {"temperature": 0.7, "seed": 5}]
)
def test_an_answer_in_a_schema_validates(client, sampling):
    City.model_validate_json(answer(client, response_format=FORMAT, **sampling))


def test_the_client_parses_an_answer_into_a_model(client):
    reply = client.chat.completions.parse(
        model=NAME, messages=CITY, response_format=City, temperature=0, max_tokens=120
    )
    assert isinstance(reply.choices[0].message.parsed, City)


def test_a_stream_says_what_the_whole_answer_says(client):
    wanted = answer(client, response_format=FORMAT)
    chunks = client.chat.completions.create(
        model=NAME, messages=CITY, temperature=0, max_tokens=120, response_format=FORMAT, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted


def test_several_answers_to_one_prompt_each_obey(client):
    reply = client.chat.completions.create(
        model=NAME, messages=CITY, n=3, seed=1, temperature=1.0, max_tokens=120, response_format=FORMAT
    )
    names = {City.model_validate_json(choice.message.content or "").name for choice in reply.choices}
    assert len(names) > 1


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"\d{4}-\d{2}"}, r"\d{4}-\d{2}"),
        ({"choice": ["mild", "hot"]}, "mild|hot"),
        ({"grammar": 'root ::= "[" [a-z]+ "]"\n'}, r"\[[a-z]+\]"),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
    ],
)
def test_completions_take_every_kind_of_constraint(client, constraint, pattern):
    # A model of 135 million parameters may go on with a word for ever.
    reply = client.completions.create(
        model=NAME,
        prompt="The answer is",
        max_tokens=60,
        temperature=0,
        extra_body={"structured_outputs": constraint, "repetition_penalty": 1.3},
    )
    assert reply.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, reply.choices[0].text)


def test_any_json_object_is_one(client):
    reply = client.completions.create(
        model=NAME,
        prompt='A point: {"x": 1, "y": 2}\nAnother point: ',
        max_tokens=40,
        temperature=0,
        extra_body={"response_format": {"type": "json_object"}},
    )
    assert isinstance(json.loads(reply.choices[0].text), dict)


def test_a_schema_that_takes_too_long_to_compile_is_refused_while_others_are_served(client, http):
    evil = {
        "type": "json_schema",
        "json_schema": {"name": "evil", "schema": {"type": "integer", "multipleOf": 300_210_000}},
    }
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(answer, client, response_format=evil)
        served = 0
        while not refused.done():
            client.completions.create(model=NAME, prompt="Hello", max_tokens=3, temperature=0)
            served += not refused.done()
        assert served > 1  # the first of them may have come before the schema did
        with pytest.raises(BadRequestError, match="takes longer than") as caught:
            refused.result()
    assert caught.value.param == "response_format"
    chain = {f"x{i}": {"$ref": f"#/$defs/x{i + 1}"} for i in range(3000)} | {"x3000": {}}
    with pytest.raises(BadRequestError, match="too deeply nested"):
        answer(
            client,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "evil", "schema": {"$ref": "#/$defs/x0", "$defs": chain}},
            },
        )
    City.model_validate_json(answer(client, response_format=FORMAT))


def test_the_readme_s_examples_run(client, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import pydantic.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {"client": client}
    exec(example, names)
    assert re.search(r"name='.*' length_km=\d+", capsys.readouterr().out)
    assert names["reply"].choices[0].text in (" yes", " no")
    (example,) = re.findall(r"```python\n(from jaxserve import SamplingParams, Struct.*?)```", readme, re.DOTALL)
    exec(example, {})
