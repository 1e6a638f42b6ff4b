"""What settings have in common, how single ones are written, and the one line that says what is wrong with one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_BYTE_UNITS = {"": 1, "B": 1}
_BYTE_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_BYTE_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}


class Settings(BaseModel):
    """Frozen, strict (a quoted "8" is no integer), and without room for misspelt names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def parse_bytes(value: object) -> object:
    """Turn "2GiB" or "500 MB" into bytes; what is no string passes through.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 KB"), parse_bytes(7)
    (2147483648, 1500, 7)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)\s*", value)
    if match is None or match[2] not in _BYTE_UNITS:
        raise ValueError("must be a number of bytes such as 2147483648, '2GiB' or '500MB'")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


def parse_count(value: object) -> object:
    """Turn "4096", "4k" (4000) or "4K" (4096) into an integer, as vLLM does; what is no string passes through.

    >>> parse_count("32"), parse_count("1.5k"), parse_count("2K"), parse_count(7)
    (32, 1500, 2048, 7)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)([kmg])|(\d+)([KMG])", value)
    if match is None:
        raise ValueError("must be an integer such as 4096, 4k (4000) or 4K (4096)")
    plain, thousands, decimal, units, binary = match.groups()
    if thousands:
        return int(float(thousands) * 1000 ** ("kmg".index(decimal) + 1))
    return int(plain or units) * 1024 ** ("KMG".index(binary) + 1 if binary else 0)


def parse_object(value: object) -> object:
    """Turn JSON text into what it says; what is no string passes through."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object ({error.msg} at character {error.pos})") from None


def parse_integers(value: object) -> object:
    """Make a tuple of a list, of one integer, or of text such as "16,32,64"."""
    if not isinstance(value, str):
        return as_tuple(value)
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError("must be integers such as 16,32,64") from None


def as_tuple(value: object) -> object:
    """Make a tuple of a list, or of one text or integer alone."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, (str, int)) else value


Bytes = Annotated[int, Field(gt=0), BeforeValidator(parse_bytes, json_schema_input_type=int | str)]
Count = Annotated[int, Field(ge=1), BeforeValidator(parse_count, json_schema_input_type=int | str)]
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple, json_schema_input_type=str | list[str])]
Integers = Annotated[tuple[int, ...], BeforeValidator(parse_integers, json_schema_input_type=int | str | list[int])]
JsonObject = Annotated[dict[str, Any], BeforeValidator(parse_object, json_schema_input_type=str | dict[str, Any])]


def describe_errors(error: ValidationError, places: Mapping[str, str], names: Collection[str]) -> str:
    """Say in one line what pydantic found: where (by setting name), which of `names`, what was wanted and given."""
    lines = [_describe(dict(problem), places, names) for problem in error.errors(include_url=False)]
    return "; ".join(dict.fromkeys(lines))


def _describe(problem: dict[str, Any], places: Mapping[str, str], names: Collection[str]) -> str:
    path = [str(part) for part in problem["loc"]]  # section, setting, and what is inside one that is an object
    name = next((part for part in path[1:] if part in names), ".".join(path))
    place = f"{places[name]}: " if name in places else ""
    if problem["type"] == "missing":
        return f"{name} is missing: give it in the launch file or as a flag"
    shown = ".".join([name, *(part for part in path[2:] if part.isidentifier())])
    given = "" if name == "api_key" else f", got {_shown(problem['input'])}"
    return f"{place}{shown} must {_wanted(problem)}{given}"


def _wanted(problem: dict[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _WANTED:
        return _WANTED[kind].format_map(context)
    return problem["msg"].removeprefix("Value error, must ").removeprefix("Input should ")


_WANTED = {
    "int_type": "be an integer",
    "float_type": "be a number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "tuple_type": "be a list",
    "dict_type": "be a mapping",
    "model_type": "be a mapping",
    "extra_forbidden": "not be given: there is no such setting",
    "string_too_short": "not be empty",
    "string_pattern_mismatch": "match {pattern}",
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
}
_TYPE_NAMES: dict[type, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


def _shown(value: object) -> str:
    return f"{value!r:.80} ({_TYPE_NAMES.get(type(value), type(value).__name__)})"
