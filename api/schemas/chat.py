"""`ChatRequest`: the body of POST /v1/chat/completions, and the messages in it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from api.schemas import unsupported
from api.schemas.base import RequestModel
from api.schemas.fields import FreeObject, check_depth
from api.schemas.sampling import SamplingFields
from jaxserve.errors import InvalidRequestError

# Of a text part: other providers' caching, and what replies say of their sources. They change no prompt.
_PART_NOTES = ("cache_control", "annotations")
# Arguments of other servers' renderers; here they would be variables that no template reads.
_NO_TEMPLATE_VARIABLES = ("chat_template", "tokenize", "return_dict", "return_tensors")


def _as_content(value: Any) -> str | list[dict[str, str]]:
    """Check a message's text, or its text parts; other kinds of parts are refused by name."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError("must be a string or a list of parts such as {'type': 'text', 'text': '...'}")
    if not value:
        raise ValueError("must hold at least one part")
    return [{"type": "text", "text": _part_text(part)} for part in value]


def _part_text(part: dict[str, Any]) -> str:
    kind = part.get("type")
    part = {name: value for name, value in part.items() if value is not None and name not in _PART_NOTES}
    if kind not in ("text", "refusal"):
        raise ValueError(f"has a part of type {str(kind)[:40]!r}; this server takes text parts only")
    text = part.get(kind)
    if not isinstance(text, str) or part.keys() != {"type", kind}:
        raise ValueError(f"has a {kind} part that is not {{'type': '{kind}', '{kind}': '...'}}")
    return text


def _as_arguments(value: Any) -> dict[str, Any]:
    """Decode a past tool call's arguments, which OpenAI sends as JSON text and templates want as an object."""
    try:
        arguments = msgspec.json.decode(value) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError("must be the JSON text of an object") from error
    if not isinstance(arguments, dict):
        raise ValueError("must be the JSON text of an object")
    return check_depth(arguments)


Content = Annotated[
    str | list[dict[str, str]],
    PlainValidator(_as_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class FunctionCall(RequestModel):
    """What a past tool call called."""

    name: str
    arguments: Annotated[dict[str, Any], PlainValidator(_as_arguments), WithJsonSchema({"type": "string"})]


class ToolCall(RequestModel):
    """A tool call in the conversation so far."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of it
    refusal: str | None = None
    annotations: list[FreeObject] | None = None  # of replies, sent back with them; no template reads them

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role != "assistant":  # replies without text have null
            raise ValueError("needs content")
        replies_alone = (self.tool_calls, self.refusal, self.reasoning_content, self.reasoning, self.annotations)
        if self.role != "assistant" and any(replies_alone):
            raise ValueError("has tool_calls, refusal, reasoning or annotations, which only an assistant's message has")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError("has tool_call_id, which only a tool's message has")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it."""
        message = self.model_dump(exclude_none=True)
        message["content"] = self.content or self.refusal or ""
        for name in ("refusal", "annotations"):
            message.pop(name, None)
        return message


class ConversationFields(RequestModel):
    """The fields that say which text the chat template makes; /tokenize takes them too."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # leave the last message open, and go on from its end
    add_special_tokens: bool = False  # templates write their own
    documents: list[FreeObject] | None = None  # for templates that read them
    chat_template_kwargs: FreeObject | None = None  # more names for the template, such as enable_thinking

    @model_validator(mode="after")
    def _check_template(self) -> ConversationFields:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message=true needs add_generation_prompt=false", param="continue_final_message"
            )
        for name in _NO_TEMPLATE_VARIABLES:
            if name in (self.chat_template_kwargs or {}):
                raise InvalidRequestError(
                    f"chat_template_kwargs must not hold {name!r}: it is no variable of a template",
                    param="chat_template_kwargs",
                )
        return self


class ChatRequest(ConversationFields, SamplingFields):
    """A conversation in, the next message out. Without a limit the answer may fill the context."""

    unsupported: ClassVar = unsupported.CHAT

    max_completion_tokens: int | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool = False
    top_logprobs: int | None = None  # 0 to 20
    reasoning_effort: str | None = None  # handed to the chat template, for models whose template reads it

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens differ; give one of them", param="max_completion_tokens"
            )
        return self
