"""Field types that take several JSON shapes and give one: stop strings, logit biases, prompts."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator, WithJsonSchema

from jaxserve.nesting import is_deeper_than

MAX_PROMPTS = 1024  # a request; more belong in several requests
MAX_DEPTH = 32  # of free-form objects
_TOKEN_ID = re.compile(r"\d{1,10}", re.ASCII)


def _as_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_id_keys(value: Any) -> Any:
    """Turn JSON's string keys into token ids."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not isinstance(key, str) or not _TOKEN_ID.fullmatch(key):
            raise ValueError(f"must have token ids as keys, got {str(key)[:40]!r}")
    return {int(key): bias for key, bias in value.items()}


def is_token_ids(value: list[Any]) -> bool:
    """Return True for a list of integers; booleans are none."""
    return all(type(item) is int for item in value)


def _as_prompts(value: Any) -> list[str | list[int]]:
    """Turn the four shapes of a prompt into a list of prompts.

    >>> _as_prompts("a"), _as_prompts([1, 2]), _as_prompts(["a", "b"]), _as_prompts([[1], [2]])
    (['a'], [[1, 2]], ['a', 'b'], [[1], [2]])
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be an empty list")
        if is_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"takes at most {MAX_PROMPTS} prompts, got {len(value)}")
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and is_token_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def check_depth(value: dict[str, Any]) -> dict[str, Any]:
    """Return a free-form object as it is, unless it is nested so deeply that copying it could fail."""
    if is_deeper_than(value, MAX_DEPTH):
        raise ValueError(f"must not be nested more than {MAX_DEPTH} levels deep")
    return value


FreeObject = Annotated[dict[str, Any], AfterValidator(check_depth)]
StopStrings = Annotated[
    list[str], BeforeValidator(_as_strings, json_schema_input_type=str | list[str])
]  # one string or several
LogitBias = Annotated[dict[int, float], BeforeValidator(_token_id_keys, json_schema_input_type=dict[str, float])]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
