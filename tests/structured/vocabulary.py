"""A small vocabulary for grammars: every byte, some words, a special token, and one id without a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured.matcher import GrammarMatcher
from jaxserve.structured.token_table import Encode, TokenTable
from jaxserve.structured_outputs import StructuredOutputsParams

WORDS = [b"yes", b"no", b'{"', b'":', b"name", b"true", b" and", "é".encode(), b"12"]
SPECIAL, EOS, EMPTY = 256 + len(WORDS), 257 + len(WORDS), 258 + len(WORDS)
TABLE = TokenTable(
    tokens=[bytes([byte]) for byte in range(256)] + WORDS + [b"<|im_end|>", b"</s>", b""],
    special_ids=[SPECIAL, EOS],
    eos_ids=[EOS],
)


def load() -> tuple[TokenTable, Encode]:
    """The table, and a tokenizer that is of no use: forced text is said in the longest tokens."""
    return TABLE, lambda text: []


STOP = 10  # a newline, where a test lets it end a sequence
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ids(text: str) -> list[int]:
    """A text in tokens of one byte."""
    return list(text.encode())


def matcher(compiler: GrammarCompiler, end_ids: Sequence[int] = (), **constraint) -> GrammarMatcher:
    """A matcher at the beginning of a constraint's grammar."""
    return compiler.matcher(grammar_text(StructuredOutputsParams(**constraint).validate()), end_ids, [])


def allowed(mask: np.ndarray) -> set[int]:
    """The tokens of a mask."""
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(TABLE.tokens)]).tolist())
