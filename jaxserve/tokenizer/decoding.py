"""How a tokenizer turns tokens back into text: the kind of its decoder, and each token's raw bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

_SPACE = "▁"  # SentencePiece's sign for a space


class DecoderKind(Enum):
    """What a token's text depends on."""

    BYTE_LEVEL = "byte-level"  # each character of a token stands for one byte
    BYTE_FALLBACK = "byte-fallback"  # SentencePiece with <0xAB> tokens
    METASPACE = "metaspace"  # SentencePiece without
    OTHER = "other"  # known to the library alone


@dataclass(frozen=True, slots=True)
class Decoding:
    """The kind of a decoder, and whether it drops the space that a text begins with."""

    kind: DecoderKind
    strips_first_space: bool = False


def decoding_of(backend: tokenizers.Tokenizer) -> Decoding:
    """Recognise the decoders whose work can be done token by token."""
    decoder: Any = backend.decoder
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding(DecoderKind.BYTE_LEVEL)
    if kinds == ["Metaspace"] and steps[0]["replacement"] == _SPACE:
        return Decoding(DecoderKind.METASPACE, strips_first_space=steps[0]["prepend_scheme"] != "never")
    replaces_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strips_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == replaces_space:
        if len(steps) == 3:
            return Decoding(DecoderKind.BYTE_FALLBACK)
        if steps[3:] == [strips_space]:
            return Decoding(DecoderKind.BYTE_FALLBACK, strips_first_space=True)
    return Decoding(DecoderKind.OTHER)


def byte_of(token: str) -> int | None:
    """Return the byte that a byte-fallback token stands for.

    >>> byte_of("<0xAB>"), byte_of("ab")
    (171, None)
    """
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes that a byte-level token stands for.

    A token with a character outside the alphabet of bytes, as added tokens may have, stands for its own UTF-8.

    >>> byte_level_bytes("Ġhi"), byte_level_bytes("好")
    (b' hi', b'\\xe5\\xa5\\xbd')
    """
    try:
        return token.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def token_bytes(token: str, kind: DecoderKind) -> bytes:
    """Return the bytes that a token adds to a text."""
    if kind is DecoderKind.BYTE_LEVEL:
        return byte_level_bytes(token)
    if kind is DecoderKind.BYTE_FALLBACK and (byte := byte_of(token)) is not None:
        return bytes([byte])
    if kind in (DecoderKind.BYTE_FALLBACK, DecoderKind.METASPACE):
        return token.replace(_SPACE, " ").encode()
    return token.encode()


def _byte_level_table() -> dict[int, int | str]:
    """Return the map from characters to bytes: printable bytes stand for themselves, the others follow from U+0100."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    table: dict[int, int | str] = {}
    shifted = 0
    for byte in range(256):
        if chr(byte) in alphabet:
            table[byte] = byte
        else:
            table[byte] = "\uffff"  # not of the alphabet: makes the whole token stand for its own UTF-8
            table[256 + shifted] = byte
            shifted += 1
    return table


_BYTE_LEVEL = _byte_level_table()
