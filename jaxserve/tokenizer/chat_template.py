"""`ChatTemplate`: messages to the prompt a model was trained on, with the model's own Jinja template.

Templates run in Jinja's sandbox and see plain data only. What goes wrong in one is the request's fault as far as a
client can tell: a 400 with the template's own words.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.errors import ChatTemplateError, TokenizerError
from jaxserve.tokenizer.content_format import ContentFormat, content_format
from jaxserve.tokenizer.tokenizer import Tokenizer
from jaxserve.tokenizer.tokenizer_files import SPECIAL_TOKEN_NAMES

_MAX_PROMPT_CHARS = 16_000_000  # far beyond any context; stops a template that multiplies its input
# What a template may raise besides Jinja's own errors: it runs Python operators on what a client sent.
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", *SPECIAL_TOKEN_NAMES)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names that clients give a message's reasoning
_END_MARK = "\u2063end of the message to continue\u2063 "  # an invisible separator on both sides; nobody writes it

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's template, or several by name: `tool_use` is taken when a request has tools. Safe in many threads."""

    def __init__(self, template: str | Mapping[str, str], *, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` become variables of the template: "bos_token" -> "<s>"."""
        named = {"default": template} if isinstance(template, str) else dict(template)
        if "default" not in named:
            raise TokenizerError(f"there is no default among the chat templates {', '.join(sorted(named))}")
        self._special_tokens = dict(special_tokens or {})
        self._compiled = {name: _CompiledTemplate(source) for name, source in named.items()}

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, *, path: Path | None = None) -> ChatTemplate | None:
        """Return the tokenizer's template, or the one in the file `path` instead; None when there is neither."""
        if path is not None:
            return cls.of_file(path, special_tokens=tokenizer.special_tokens)
        template = tokenizer.chat_template
        return None if template is None else cls(template, special_tokens=tokenizer.special_tokens)

    @classmethod
    def of_file(cls, path: Path, *, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """Return the template in a file; `TokenizerError` where it is missing or broken."""
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"cannot read the chat template {path}: {error}") from error
        try:
            return cls(template, special_tokens=special_tokens)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt. `extra` are further variables of the template, such as `enable_thinking`.

        `continue_final_message` leaves the last message open, so that the model goes on with it.
        """
        if not messages:
            raise ChatTemplateError("there are no messages", param="messages")
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        template = self._compiled["tool_use" if tools and "tool_use" in self._compiled else "default"]
        try:
            variables = {
                **self._special_tokens,
                **_checked_extra(extra or {}),
                "messages": [_plain_message(message, template.content_format) for message in messages],
                "tools": copy.deepcopy(list(tools)) if tools else None,
                "documents": copy.deepcopy(list(documents)) if documents else None,
                "add_generation_prompt": add_generation_prompt,
            }
        except RecursionError as error:
            raise ChatTemplateError("the messages or tools are nested too deeply", param="messages") from error
        if not continue_final_message:
            return template.render(variables)
        _mark_end(variables["messages"][-1])
        return _cut_at_mark(template.render(variables))


class _CompiledTemplate:
    """One template, ready to run."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
            self.content_format = content_format(_ENVIRONMENT.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template is broken in line {error.lineno}: {error.message}") from error

    def render(self, variables: dict[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > _MAX_PROMPT_CHARS:
                    raise ChatTemplateError(f"the prompt grew past {_MAX_PROMPT_CHARS} characters", param="messages")
                parts.append(part)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refused: {_first_line(error)}", param="messages") from error
        except _TEMPLATE_FAULTS as error:
            raise ChatTemplateError(
                f"the chat template cannot use these messages: {_first_line(error)}", param="messages"
            ) from error
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}`, with which training marks the assistant's part; it renders as its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models saw it in training: without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


def _checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    for name in extra:
        if name in _RESERVED or name in _ENVIRONMENT.globals:
            raise ChatTemplateError(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
    return copy.deepcopy(dict(extra))


def _plain_message(message: Message, wanted: ContentFormat) -> dict[str, Any]:
    """Copy a message, with its content as one string or as a list of parts, as the template wants it."""
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"a message is a {type(message).__name__}, not an object", param="messages")
    plain = copy.deepcopy(dict(message))
    content = plain.get("content")
    if isinstance(content, list) and wanted is ContentFormat.TEXT:
        plain["content"] = _joined_text(content)
    if isinstance(content, str) and wanted is ContentFormat.PARTS:
        plain["content"] = [{"type": "text", "text": content}]
    reasoning = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _joined_text(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ChatTemplateError(f"this model takes text only, not content of the type {kind!r}", param="messages")
    return "\n".join(texts)


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _END_MARK
            return
    raise ChatTemplateError("continue_final_message needs text in the last message", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    """Cut off what the template put behind the last message; a template that trims messages trims this one too."""
    if (position := text.rfind(_END_MARK)) >= 0:
        return text[:position]
    position = text.rfind(_END_MARK.rstrip())
    if position < 0:
        raise ChatTemplateError(
            "the chat template does not print the last message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:position].rstrip()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__
