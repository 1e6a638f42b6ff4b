"""`RequestModel`: the base of every request schema, and the check for parameters that are known but not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from api.schemas.unsupported import Unsupported
from jaxserve.errors import InvalidRequestError


class RequestModel(BaseModel):
    """Strict (true is no integer, "1" is no number) and without room for unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}  # by field name

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """A field that is null counts as not given."""
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value

    @classmethod
    def check_unsupported(cls, fields: dict[str, Any]) -> None:
        """Raise for a parameter this server cannot honour; remove those whose value asks for nothing."""
        for name in [name for name in cls.unsupported if name in fields]:
            parameter = cls.unsupported[name]
            if not parameter.asks_nothing(fields[name], fields):
                raise InvalidRequestError(
                    f"{name} is not supported: {parameter.reason}", param=name, code="unsupported_parameter"
                )
            del fields[name]


class StreamOptions(RequestModel):
    """What a stream carries besides its text."""

    include_usage: bool = False  # a last chunk with the token counts
    continuous_usage_stats: bool = False  # token counts so far in every chunk
    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis

    @field_validator("include_obfuscation")
    @classmethod
    def _check_obfuscation(cls, value: bool) -> bool:
        if value:
            raise ValueError("is not supported: chunks are not padded")
        return value
