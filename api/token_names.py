"""`TokenNames`: the text and bytes of a token, as log-probability entries show them; looked up once a token."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenName:
    """How one token is shown."""

    text: str  # U+FFFD where the bytes alone are no text
    key: str  # unique text, for objects keyed by token: "bytes:\\xe2\\x82" where the bytes alone are no text
    token_bytes: list[int]


@dataclass(frozen=True, slots=True)
class TokenNames:
    """A cache over the tokenizer; it grows to the vocabulary at most."""

    tokenizer: Tokenizer
    _names: dict[int, TokenName] = field(default_factory=dict)

    def __getitem__(self, token_id: int) -> TokenName:
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = _name(self.tokenizer.token_bytes(token_id))
        return name


def _name(token_bytes: bytes) -> TokenName:
    """Name a token by its bytes.

    >>> _name(" the".encode()).key
    ' the'
    >>> _name(b"\\xe2\\x82").key
    'bytes:\\\\xe2\\\\x82'
    """
    try:
        key = text = token_bytes.decode()
    except UnicodeDecodeError:
        text = token_bytes.decode(errors="replace")
        key = "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
    return TokenName(text, key, list(token_bytes))
