"""Reading a request's body: content type, JSON, schema; whatever is wrong becomes one clear sentence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from api.errors import ContentTypeError
from api.schemas.base import RequestModel
from jaxserve.errors import InvalidRequestError

Model = TypeVar("Model", bound=RequestModel)

_WANTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}
_JSON_NAMES = {
    bool: "a boolean", dict: "an object", float: "a number", int: "an integer", list: "a list",
    str: "a string", type(None): "null",
}  # fmt: skip
_MAX_QUOTED_CHARS = 40
_MAX_EXPLAINED_BYTES = 65536  # of a body that cannot be read; Python's own reader takes a millisecond for them
_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_body(request: Request, model: type[Model]) -> Model:
    """Read and check the body; raises `RequestError`s only."""
    return check_fields(await read_fields(request), model)


async def read_fields(request: Request) -> dict[str, Any]:
    """Read the body as a JSON object. A field that is null counts as not given."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.split(";", 1)[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ContentTypeError(content_type)
    fields = _parse_object(await request.body())
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(fields: dict[str, Any], model: type[Model]) -> Model:
    """Check a JSON object against a schema."""
    model.check_unsupported(fields)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error, model) from None


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise _why_unreadable(data, error) from None
    except RecursionError:
        raise InvalidRequestError("the request body is nested too deeply", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"the request body must be a JSON object, got {_JSON_NAMES[type(value)]}", code="invalid_json"
        )
    return value


def _why_unreadable(data: bytes, error: Exception) -> InvalidRequestError:
    """Say what is wrong with a body; a value that Python's own reader takes, and we do not, is named by its field."""
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        return InvalidRequestError(
            f"the request body is not valid UTF-8: {wrong.reason}, byte {wrong.start}", code="invalid_json"
        )
    if len(data) <= _MAX_EXPLAINED_BYTES:
        try:
            value = json.loads(data, parse_int=float)
        except (ValueError, RecursionError):
            value = None  # not JSON for that reader either
        for path, leaf in _leaves(value) if isinstance(value, dict) else ():
            if isinstance(leaf, float) and not math.isfinite(leaf):
                return InvalidRequestError(f"{path} must be a number that is finite and not so large", param=path)
            if isinstance(leaf, str) and _SURROGATE.search(leaf):
                return InvalidRequestError(
                    f"{path or 'a field'} holds half of a surrogate pair, which is no character", param=path or None
                )
    return InvalidRequestError(f"the request body is not valid JSON: {error}", code="invalid_json")


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value in an object that is neither object nor list, with its path; before them an object's names."""
    open_values: list[tuple[tuple[int | str, ...], Any]] = [((), value)]
    while open_values:
        location, value = open_values.pop()
        if isinstance(value, dict):
            yield from ((field_path(location), name) for name in value)
            open_values += [((*location, name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            open_values += [((*location, index), inner) for index, inner in enumerate(value)]
        else:
            yield field_path(location), value


def _first_error(error: ValidationError, model: type[RequestModel]) -> InvalidRequestError:
    details = error.errors(include_url=False)[0]
    path = field_path(details["loc"])
    kind = details["type"]
    if kind == "extra_forbidden":
        return InvalidRequestError(_unknown_field(details, path, model), param=path, code="unknown_parameter")
    if kind == "missing":
        return InvalidRequestError(f"{path} is required", param=path, code="missing_required_parameter")
    return InvalidRequestError(_sentence(details, path), param=path or None)


def _sentence(details: ErrorDetails, path: str) -> str:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind == "value_error":
        return f"{path} {context['error']}" if path else str(context["error"])
    if kind == "literal_error":
        return f"{path} must be {context['expected']}, got {quoted(value)}"
    if kind in _WANTED:
        return f"{path} must be {_WANTED[kind]}, got {quoted(value)}"
    if kind == "too_short":
        return f"{path} must hold at least {context['min_length']}, got {context['actual_length']}"
    return f"{path} is wrong: {details['msg']}, got {quoted(value)}"


def _unknown_field(details: ErrorDetails, path: str, model: type[RequestModel]) -> str:
    name = str(details["loc"][-1])
    known = model.model_fields if len(details["loc"]) == 1 else ()
    nearest = get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown field {path!r}{hint}"


def field_path(location: tuple[int | str, ...]) -> str:
    """Return where a value stands, as one would write it in JavaScript.

    >>> field_path(("messages", 0, "content"))
    'messages[0].content'
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + part[:100]
    return path


def quoted(value: object) -> str:
    """Return a JSON value for an error message: its kind, and the value itself where it is short.

    >>> quoted("five"), quoted([1, 2]), quoted(True)
    ('the string "five"', 'a list', 'the boolean true')
    """
    name = _JSON_NAMES.get(type(value), "another value")
    if value is None or isinstance(value, (dict, list)):
        return name
    text = msgspec.json.encode(value).decode()
    if len(text) > _MAX_QUOTED_CHARS:
        return name
    return f"{name.replace('an ', 'the ').replace('a ', 'the ')} {text}"
