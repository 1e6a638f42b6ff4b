"""Whether two models' tokens have the same ids."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers

from jaxserve.tokenizer.tokenizer_files import read_tokenizer_files
from jaxserve.weights.source import ModelSource


@dataclass(frozen=True, slots=True)
class Difference:
    """An id that stands for one token in one vocabulary and for another in the other."""

    token_id: int
    token: str
    other: str


def first_difference(one: ModelSource, other: ModelSource) -> Difference | None:
    """The lowest id that both vocabularies have, with different tokens; None also where one has no tokenizer.json.

    Ids that one of them lacks are none: models of a family differ in the special tokens at the end.
    """
    if one.kind != "folder" or other.kind != "folder":
        return None
    files = [source.path / "tokenizer.json" for source in (one, other)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return None
    tokens, others = (_tokens_by_id(read_tokenizer_files(source).backend) for source in (one, other))
    differing = [token_id for token_id in tokens.keys() & others.keys() if tokens[token_id] != others[token_id]]
    if not differing:
        return None
    token_id = min(differing)
    return Difference(token_id, tokens[token_id], others[token_id])


def _tokens_by_id(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
