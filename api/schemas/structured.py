"""`ConstraintFields`: how a request says what its answer must look like, in OpenAI's words and vLLM's, old and new."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from api.schemas.base import RequestModel
from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import StructuredOutputsParams


def _as_schema(value: Any) -> str | dict[str, Any]:
    if not isinstance(value, (str, dict)):
        raise ValueError("must be a JSON schema: an object, or its text")
    return value


# Not checked for depth as other objects are: `StructuredOutputsParams` takes schemas that are deeper.
Schema = Annotated[
    str | dict[str, Any],
    PlainValidator(_as_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]


class JsonSchemaFormat(RequestModel):
    """The schema of response_format; whether `strict` or not, answers are held to it."""

    name: str | None = None
    description: str | None = None
    json_schema: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        given = self.json_schema is not None and self.json_schema.json_schema is not None
        if given != (self.type == "json_schema"):
            raise ValueError("must have json_schema.schema with the type 'json_schema', and with no other type")
        return self

    def constraint(self) -> StructuredOutputsParams | None:
        """What it asks for; None for plain text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=self.json_schema.json_schema)


class StructuredOutputs(RequestModel):
    """vLLM's way: one constraint, and how JSON may be written."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def constraint(self) -> StructuredOutputsParams:
        """The same as the engine takes it."""
        return StructuredOutputsParams(**self.model_dump(by_alias=True))


class ConstraintFields(RequestModel):
    """At most one of these fields may ask for something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None  # these four: older names of structured_outputs' fields
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None  # with guided_json

    @property
    def constraint_field(self) -> str | None:
        """The field that asks for a constraint; raises `InvalidRequestError` where several do."""
        asking = [name for name in _FIELDS if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type == "text":
            asking.remove("response_format")
        if len(asking) > 1:
            raise InvalidRequestError(f"give one of {' and '.join(asking)}, not both", param=asking[1])
        if self.guided_whitespace_pattern is not None and asking != ["guided_json"]:
            raise InvalidRequestError(
                "guided_whitespace_pattern goes with guided_json alone", param="guided_whitespace_pattern"
            )
        return asking[0] if asking else None

    def constraint(self) -> StructuredOutputsParams | None:
        """What the answer must look like, checked; raises `InvalidRequestError`."""
        name = self.constraint_field
        if name is None:
            return None
        value = getattr(self, name)
        if isinstance(value, (ResponseFormat, StructuredOutputs)):
            constraint = value.constraint()
        else:
            given: dict[str, Any] = {name.removeprefix("guided_"): value}
            constraint = StructuredOutputsParams(**given, whitespace_pattern=self.guided_whitespace_pattern)
        return constraint and constraint.validate()


_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
