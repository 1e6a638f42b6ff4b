"""Structured outputs of a model with SentencePiece's tokenizer: spaces in front of words, bytes for what is rare."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.e2e.server import ServerProcess
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.quick_compiles import QUICK_COMPILES
from tests.sentence_piece import VOCABULARY, write_sentence_piece

NAME, CODE = r"[A-Zé你 ]{2,4}", r"(é|Ø| the |你){3}\n"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": f"^{NAME}$"}, "naïve": {"enum": ["rød", "the café"]}},
    "required": ["name", "naïve"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("sentence-piece")
    model = write_sentence_piece(write_config(folder / "tiny", vocab_size=len(VOCABULARY) + 5))
    arguments = (str(model), *TINY_SHAPES, "--load-format", "dummy")
    with (
        ServerProcess(folder / "log", *arguments, env=QUICK_COMPILES) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return re.fullmatch(NAME, value["name"]) is not None and value["naïve"] in ("rød", "the café") and len(value) == 2


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("constraint", "obeys"),
    [
        ({"json": SCHEMA, "disable_any_whitespace": True}, is_of_schema),
        ({"regex": CODE}, lambda text: re.fullmatch(CODE, text) is not None),
        ({"choice": ["naïve", "你好 the end"]}, ["naïve", "你好 the end"].__contains__),
    ],
)
def test_answers_obey_and_a_stream_says_the_same(tiny, constraint, obeys, seed):
    options = {
        "model": tiny.models.list().data[0].id,
        "prompt": "the café:",
        "max_tokens": 90,
        "temperature": 1.0,
        "seed": seed,
        "extra_body": {"structured_outputs": constraint},
    }
    reply = tiny.completions.create(**options)
    assert reply.choices[0].finish_reason == "stop"
    assert obeys(reply.choices[0].text), reply.choices[0].text
    chunks = [chunk.choices[0].text for chunk in tiny.completions.create(**options, stream=True) if chunk.choices]
    assert "".join(chunks) == reply.choices[0].text
