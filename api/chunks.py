"""From the engine's deltas to stream chunks, cheaply: the common chunk is a template with one string put in.

data: {"id":...,"choices":[{"index":0,"delta":{"content":   " text"   },"logprobs":null,"finish_reason":null}]}
      |-------------------- _before[0] -------------------| encoded |------------------ _after ----------------|
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import msgspec

from api import from_engine
from api.reply import Reply, Usage, finish_reason, prompt_text
from api.schemas.base import StreamOptions
from api.schemas.chat import ChatRequest
from api.schemas.completion import CompletionRequest
from api.sse import event
from jaxserve.outputs import CompletionOutput, RequestOutput

_encode = msgspec.json.Encoder().encode


class Chunks(ABC):
    """Writes the chunks of one streamed answer. Feed it every output in order, then take `last()`."""

    _kind: str  # OpenAI's `object`
    _text_fields: tuple[bytes, bytes]  # around a choice's text, in a chunk that has nothing else

    def __init__(self, reply: Reply, options: StreamOptions | None, *, is_rich: bool) -> None:
        options = options or StreamOptions()
        self._reply = reply
        self._include_usage = options.include_usage
        self._continuous_usage = options.continuous_usage_stats
        self._usage = Usage()
        self._head = reply.head(self._kind)
        self._started: set[int] = set()  # prompts
        # Rich chunks carry more than text, so each is encoded whole.
        self._is_rich = is_rich or reply.with_token_ids or self._continuous_usage
        self._before: dict[int, bytes] = {}  # by choice
        self._after = self._text_fields[1] + b"]" + (b',"usage":null' if self._include_usage else b"") + b"}\n\n"

    def feed(self, prompt_index: int, output: RequestOutput) -> bytes:
        """Return the events of one output, possibly none."""
        parts = []
        if prompt_index not in self._started:
            self._started.add(prompt_index)
            self._usage.add_prompt(output)
            parts += [self._chunk(choice) for choice in self._first_choices(prompt_index, output)]
        for sequence in output.outputs:
            self._usage.num_completion_tokens += len(sequence.token_ids)
            index = self._reply.index(prompt_index, sequence)
            if self._is_rich or sequence.finish_reason is not None:
                parts.append(self._rich_chunk(index, prompt_index, sequence))
            elif sequence.text:
                before = self._before.get(index) or self._start_template(index)
                parts.append(before + _encode(sequence.text) + self._after)
        return b"".join(parts)

    def last(self) -> bytes:
        """Return what ends the stream: the token counts if asked for, and the end mark."""
        usage = event(self._head | {"choices": [], "usage": self._usage.to_json()}) if self._include_usage else b""
        return usage + b"data: [DONE]\n\n"

    @property
    def usage(self) -> Usage:
        """The token counts so far."""
        return self._usage

    @abstractmethod
    def _first_choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Return the choices that are sent before a prompt's first text."""

    @abstractmethod
    def _choice(self, index: int, prompt_index: int, sequence: CompletionOutput) -> dict[str, Any]:
        """Return a choice with all that was asked for."""

    def _rich_chunk(self, index: int, prompt_index: int, sequence: CompletionOutput) -> bytes:
        is_news = sequence.text or sequence.logprobs or sequence.finish_reason or self._reply.with_token_ids
        if not is_news:
            return b""
        choice = self._choice(index, prompt_index, sequence)
        if sequence.finish_reason is not None:
            choice |= from_engine.end_fields(sequence)
        if self._reply.with_token_ids:
            choice["token_ids"] = sequence.token_ids
        return self._chunk(choice)

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = self._head | {"choices": [choice]}
        if self._continuous_usage:
            chunk["usage"] = self._usage.to_json()
        elif self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _start_template(self, index: int) -> bytes:
        head = _encode(self._head)[:-1]
        before = b"data: " + head + b',"choices":[{"index":%d,' % index + self._text_fields[0]
        self._before[index] = before
        return before


class ChatChunks(Chunks):
    """The chunks of a chat: each choice begins with its role."""

    _kind = "chat.completion.chunk"
    _text_fields = (b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null}')

    def __init__(self, reply: Reply, request: ChatRequest) -> None:
        super().__init__(reply, request.stream_options, is_rich=request.logprobs)
        self._request = request

    def _first_choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": from_engine.echoed_message(self._request)}
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._reply.params.n)
        ]
        if self._reply.with_token_ids:
            choices = [choice | {"prompt_token_ids": output.prompt_token_ids} for choice in choices]
        return choices

    def _choice(self, index: int, prompt_index: int, sequence: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs and sequence.logprobs:
            logprobs = self._reply.forms.chat(sequence.logprobs, self._request.top_logprobs or 0)
        delta = {"content": sequence.text} if sequence.text or logprobs else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class CompletionChunks(Chunks):
    """The chunks of text completions; with `echo` each choice begins with its prompt."""

    _kind = "text_completion"
    _text_fields = (b'"text":', b',"logprobs":null,"finish_reason":null}')

    def __init__(self, reply: Reply, request: CompletionRequest) -> None:
        super().__init__(reply, request.stream_options, is_rich=request.logprobs is not None or request.max_tokens == 0)
        self._request = request
        self._prompt_chars: dict[int, int] = {}  # by prompt; where generated text begins
        self._scores_prompt = request.echo and request.logprobs is not None
        self._held: dict[int, list[RequestOutput]] = {}  # by prompt; news that came before the prompt's scores

    def feed(self, prompt_index: int, output: RequestOutput) -> bytes:
        """Return the events of one output; with `max_tokens=0` they hold the prompt alone."""
        if self._scores_prompt and prompt_index not in self._started:
            if output.prompt_logprobs is None:
                for sequence in output.outputs:
                    finish_reason(sequence)  # raises for one that was aborted: the scores will never come
                self._held.setdefault(prompt_index, []).append(output)
                return b""
            # The echoed prompt goes first, and what was held follows it.
            head = replace(output, outputs=[])
            outputs = [head, *self._held.pop(prompt_index, ()), output]
            return b"".join(self._feed(prompt_index, item) for item in outputs)
        return self._feed(prompt_index, output)

    def _feed(self, prompt_index: int, output: RequestOutput) -> bytes:
        if self._request.max_tokens == 0:
            output = replace(output, outputs=[from_engine.without_tokens(sequence) for sequence in output.outputs])
        return super().feed(prompt_index, output)

    def _first_choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        reply, request = self._reply, self._request
        if not request.echo and not reply.with_token_ids:
            return []
        text = prompt_text(output, reply) if request.echo else ""
        self._prompt_chars[prompt_index] = len(text)
        logprobs = None
        if request.echo and request.logprobs is not None:
            logprobs = from_engine.prompt_completion_logprobs(reply, output, request.logprobs, text)
        first = {"text": text, "logprobs": logprobs, "finish_reason": None}
        if reply.with_token_ids:
            first["prompt_token_ids"] = output.prompt_token_ids
        n = reply.params.n
        return [{"index": prompt_index * n + index} | first for index in range(n)]

    def _choice(self, index: int, prompt_index: int, sequence: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None and sequence.logprobs:
            first_offset = self._prompt_chars.get(prompt_index, 0)
            logprobs = from_engine.completion_logprobs(self._reply, sequence, self._request.logprobs, first_offset)
        return {"index": index, "text": sequence.text, "logprobs": logprobs, "finish_reason": None}
