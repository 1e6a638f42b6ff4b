"""`TokenTable`: what a grammar must know of a vocabulary, each token's bytes; and llguidance's compiler over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from jaxserve.tokenizer.tokenizer import Tokenizer

Encode: TypeAlias = Callable[[str], list[int]]

# What a grammar may cost, in llguidance's own units; a mask of an ordinary schema takes a hundredth of it.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,  # about 4 ms
    step_lexer_fuel=50_000,  # about 4 ms a mask
    step_max_items=20_000,  # about 1 ms a mask
    max_lexer_states=20_000,  # about 1.5 kB each
    max_grammar_size=50_000,
    verbose_errors=False,
)


class TokenTable(msgspec.Struct, frozen=True, kw_only=True):
    """A model's tokens as bytes; plain data that crosses processes."""

    tokens: list[bytes]  # by id; empty where the model has an embedding and the tokenizer no token
    special_ids: list[int]  # tokens that are no text
    eos_ids: list[int]  # what ends an answer; at least one

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: list[int]) -> TokenTable:
        """The table of a tokenizer for a model that has `vocab_size` logits."""
        return cls(
            tokens=[tokenizer.token_bytes(token_id) for token_id in range(vocab_size)],
            special_ids=sorted(token_id for token_id in tokenizer.special_ids if token_id < vocab_size),
            eos_ids=sorted(token_id for token_id in eos_ids if token_id < vocab_size),
        )

    def tokenizer(self, encode: Encode | None = None) -> LLTokenizer:
        """llguidance's view of it, with a prefix tree of all tokens: 0.1 s for 50,000.

        Where a grammar leaves one text, that is said in the tokens of `encode`; without, in the longest that fit.
        """
        return LLTokenizer(TokenizerWrapper(_Tokens(self, encode)), eos_token=self.eos_ids)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the grammar's beginning; `is_error` and `get_error` say where there is none. Holds no lock."""
    return LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)


class _Tokens:
    """The shape in which llguidance takes a vocabulary."""

    def __init__(self, table: TokenTable, encode: Encode | None) -> None:
        self.eos_token_id = table.eos_ids[0]
        self.bos_token_id = None
        self.tokens = table.tokens
        self.special_token_ids = table.special_ids
        self._encode = encode
        self._special = {*table.special_ids, *table.eos_ids}
        self._ids = {token: i for i, token in enumerate(table.tokens) if token and i not in self._special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that spell a text byte for byte, none of them special."""
        token_ids = [] if self._encode is None else self._encode(text.decode())
        spelt = [self.tokens[token_id] for token_id in token_ids]
        is_spelt = b"".join(spelt) == text and all(spelt)
        return token_ids if is_spelt and self._special.isdisjoint(token_ids) else self._longest_tokens(text)

    def _longest_tokens(self, text: bytes) -> list[int]:
        token_ids: list[int] = []
        begin = 0
        while begin < len(text):
            sizes = range(min(self._longest, len(text) - begin), 0, -1)
            size = next((size for size in sizes if text[begin : begin + size] in self._ids), None)
            if size is None:  # a byte that no token has
                return []
            token_ids.append(self._ids[text[begin : begin + size]])
            begin += size
        return token_ids
