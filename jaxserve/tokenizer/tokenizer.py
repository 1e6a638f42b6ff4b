"""`Tokenizer`: text to token ids and back, the same for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from jaxserve.errors import InvalidRequestError
from jaxserve.tokenizer.decoding import DecoderKind, Decoding, byte_level_bytes, decoding_of, token_bytes
from jaxserve.tokenizer.tokenizer_files import TokenizerFiles, read_tokenizer_files
from jaxserve.weights.source import ModelSource, resolve_source

MAX_INLINE_CHARS = 4096  # tokenised in a millisecond or so; longer texts belong into a thread of their own


class Tokenizer:
    """A model's tokenizer. Nothing changes after construction: any thread may call it at any time."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.name = files.name
        self.backend = files.backend
        self.decoding: Decoding = decoding_of(self.backend)
        self.special_tokens = dict(files.special_tokens)  # "bos_token" -> "<s>"
        self.chat_template: str | dict[str, str] | None = files.chat_template
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._tokens: list[str | None] = [None] * self.vocab_size
        for token, token_id in vocabulary.items():
            self._tokens[token_id] = token
        added = self.backend.get_added_tokens_decoder()
        for token_id in added:  # a normaliser may have changed them, which decoding sees and the vocabulary does not
            self._tokens[token_id] = self.backend.id_to_token(token_id)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.pad_token_id = self._special_id("pad_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = tuple(sorted({*files.eos_token_ids, *(() if eos is None else (eos,))}))

    @classmethod
    def from_source(cls, source: ModelSource | str | Path) -> Tokenizer:
        """Read the tokenizer of a model: a resolved source, or anything that `resolve_source` takes."""
        if not isinstance(source, ModelSource):
            source = resolve_source(source, tokenizer_only=True)
        return cls(read_tokenizer_files(source))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids; special tokens written in the text are recognised."""
        try:
            if len(text) <= MAX_INLINE_CHARS:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            # In the library, only the batch calls let go of the interpreter's lock, and so let other threads run.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError("the text holds lone surrogates, which are not valid Unicode") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text; ids that are no token (a padded vocabulary has them) add nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """Return the tokens as the vocabulary spells them ("Ġhello"); None for an id that is no token."""
        return [self.token(token_id) for token_id in token_ids]

    def token(self, token_id: int) -> str | None:
        """Return one token as the vocabulary spells it."""
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes that a token adds to the text; they need not be whole UTF-8 characters."""
        token = self.token(token_id)
        if token is None:
            return b""
        if self.decoding.kind is DecoderKind.OTHER:
            return self.backend.decode([token_id], skip_special_tokens=False).encode()
        return token_bytes(token, self.decoding.kind)

    def token_text(self, token_id: int) -> str:
        """Return a token's bytes as text, with U+FFFD for what is not UTF-8; what log-probabilities name it by."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def stream_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the byte-level decoder makes of a token, added ones included; for the detokenizer."""
        token = self.token(token_id)
        return b"" if token is None else byte_level_bytes(token)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def tokenizer_from_backend(backend: tokenizers.Tokenizer, *, name: str = "in memory") -> Tokenizer:
    """Wrap a tokenizer of the tokenizers library; for tests and tools."""
    return Tokenizer(TokenizerFiles(name=name, backend=backend))
