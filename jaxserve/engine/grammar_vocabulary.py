"""The vocabulary that an engine's grammars are compiled for."""

from __future__ import annotations

from functools import partial

from jaxserve.config import ModelSettings
from jaxserve.engine.preparation import load_tokenizer
from jaxserve.runner.loading import ModelFiles
from jaxserve.structured.token_table import Encode, TokenTable


def vocabulary_of_grammars(settings: ModelSettings, files: ModelFiles) -> tuple[TokenTable, Encode]:
    """A model's tokens, and how its tokenizer spells a text; `TokenizerError` where it has none that will do."""
    tokenizer = load_tokenizer(settings)
    eos_ids = [*files.eos_token_ids, *tokenizer.eos_token_ids]
    table = TokenTable.of(tokenizer, vocab_size=files.decoder.vocab_size, eos_ids=eos_ids)
    return table, partial(tokenizer.encode, add_special_tokens=False)
