"""`IncrementalDetokenizer`: token ids in, new text out, for streaming.

Whatever the pieces in which ids are pushed, the texts that `push` and `flush` return, put together, are what
`Tokenizer.decode` gives for all ids. Text that a later token could still change is held back: the bytes of an
unfinished character, and in SentencePiece a run of byte tokens, which counts as text only if all of it is UTF-8.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxserve.tokenizer.decoding import DecoderKind, byte_of
from jaxserve.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Decodes one request's output. Each token costs the same, however long the output is."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues_text: bool = False) -> None:
        """With `continues_text` the ids follow a prompt: SentencePiece's first space is then part of the text."""
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream = _stream(tokenizer, skip_special_tokens, continues_text)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that is certain now."""
        return "".join([self._stream.push(token_id) for token_id in token_ids if token_id not in self._skipped])

    def flush(self) -> str:
        """Return what was held back, as `decode` would end the text; the output is over."""
        return self._stream.flush()


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def _stream(tokenizer: Tokenizer, skip_special_tokens: bool, continues_text: bool) -> _Stream:
    kind = tokenizer.decoding.kind
    strips = tokenizer.decoding.strips_first_space and not continues_text
    if kind is DecoderKind.BYTE_LEVEL:
        return _ByteLevelStream(tokenizer)
    if kind is DecoderKind.BYTE_FALLBACK:
        return _ByteFallbackStream(tokenizer, strips)
    if kind is DecoderKind.METASPACE:
        return _MetaspaceStream(tokenizer, strips)
    return _WindowStream(tokenizer, skip_special_tokens)


class _ByteLevelStream:
    """The bytes of all tokens in a row, read as UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.stream_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallbackStream:
    """Whole pieces, and runs of byte tokens between them."""

    def __init__(self, tokenizer: Tokenizer, strips_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._strip_next = strips_first_space
        self._run = bytearray()  # byte tokens since the last piece

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        byte = byte_of(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + token.replace("▁", " "))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        if not text or not self._strip_next:
            return text
        self._strip_next = False
        return text.removeprefix(" ")


class _MetaspaceStream:
    """Whole pieces; the first one has no leading space."""

    def __init__(self, tokenizer: Tokenizer, strips_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._strip_next = strips_first_space

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        space, self._strip_next = "" if self._strip_next else " ", False
        return token.replace("▁", space)

    def flush(self) -> str:
        return ""


class _WindowStream:
    """Any other decoder: decodes the last few tokens with and without the new ones and returns the difference.

    Exact as long as a token's text depends on no token before the previous piece of text, and on none after it.

    # ids      .... | prefix ... | read ... now
    # text     emitted           | new
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # ids of the last emitted piece, then those not emitted
        self._num_emitted = 0  # of the window

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        new = self._new_text()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        del self._window[: self._num_emitted]
        self._num_emitted = len(self._window)
        return new

    def flush(self) -> str:
        new = self._new_text()
        self._num_emitted = len(self._window)
        return new

    def _new_text(self) -> str:
        emitted = self._decode(self._window[: self._num_emitted])
        return self._decode(self._window)[len(emitted) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
