"""Grammars in an engine: answers obey them, and are the same however the engine runs; requests end well and badly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine.core import EngineCore
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.checkpoints import save_random_llama
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens

EOS = 256
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 999, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(save_random_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="module")
def core(checkpoint: Path) -> Iterator[EngineCore]:
    core = EngineCore(tiny_config(str(checkpoint)))
    yield core
    assert core.stats().num_compiles_after_ready == 0
    core.shutdown()


def params(num_tokens: int = 60, *, temperature: float = 0.0, seed: int = 3, **changes) -> SamplingParams:
    """Parameters with the constraint among `changes`, as a front end hands them on."""
    constraint = {name: changes.pop(name) for name in list(changes) if name in StructuredOutputsParams.__slots__}
    grammar = grammar_text(StructuredOutputsParams(disable_any_whitespace="json" in constraint, **constraint))
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=num_tokens, structured_outputs_grammar=grammar, **changes
    )


def text(deltas: list[TokenDelta]) -> str:
    return bytes(BYTES[token_id] for token_id in tokens(deltas) if token_id < EOS).decode()


def test_a():
    pass
