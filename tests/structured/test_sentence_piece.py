"""Grammars over SentencePiece's vocabularies: whatever the masks allow, the text that clients read obeys."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured.token_table import TokenTable
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer
from jaxserve.tokenizer.tokenizer import Tokenizer, tokenizer_from_backend
from tests.sentence_piece import EOS, like_gemma, like_llama, like_t5

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[é你a-h ]{1,9}$"}, "tags": {"enum": ["the é", ["你"]]}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    is_name = re.fullmatch("[é你a-h ]{1,9}", value["name"]) is not None
    return is_name and value["tags"] in ("the é", ["你"]) and len(value) == 2


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


CHOICE, REGEX, ANY_BUT_SPACE = ["the café", "naé 你", "no"], "(é|你| the|[0-3 ]){2,9}\\.", "[^ \n]{1,9}\\."
CASES = {
    "schema": ({"json": SCHEMA}, is_of_schema),
    "choice": ({"choice": CHOICE}, CHOICE.__contains__),
    "regex": ({"regex": REGEX}, matches(REGEX)),
    "no space": ({"regex": ANY_BUT_SPACE}, matches(ANY_BUT_SPACE)),
}


def compiler_for(tokenizer: Tokenizer) -> GrammarCompiler:
    """As an engine has it, for a model with embeddings that are no token's."""
    table = TokenTable.of(tokenizer, vocab_size=tokenizer.vocab_size + 3, eos_ids=[EOS])
    return GrammarCompiler(lambda: (table, lambda text: tokenizer.encode(text, add_special_tokens=False)))


def said(compiler: GrammarCompiler, constraint: dict, seed: int) -> list[int]:
    """Tokens drawn from the masks alone, up to the end."""
    grammar = grammar_text(StructuredOutputsParams(**constraint).validate())
    matcher, draw, token_ids = compiler.matcher(grammar, [], []), random.Random(seed), []
    while not matcher.has_ended:
        (mask,) = compiler.masks.make([(matcher, [])])
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        token_ids.append(EOS if EOS in allowed else draw.choice(allowed))
        matcher.consume(token_ids[-1:])
        assert matcher.error == ""
    return token_ids


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [like_llama, like_gemma, like_t5])
def test_the_text_of_what_is_allowed_obeys(backend: Callable[[], Backend], case):
    constraint, obeys = CASES[case]
    tokenizer = tokenizer_from_backend(backend())
    compiler = compiler_for(tokenizer)
    for seed in range(40):
        token_ids = said(compiler, constraint, seed)
        detokenizer = IncrementalDetokenizer(tokenizer, continues_text=True)
        text = "".join(detokenizer.push([token_id]) for token_id in token_ids) + detokenizer.flush()
        assert obeys(text), [tokenizer.token(token_id) for token_id in token_ids]
        before = tokenizer.encode("a", add_special_tokens=False)
        assert tokenizer.decode(before + token_ids) == "a" + text
    compiler.close()


def test_tokens_that_were_added_may_be_said_for_the_spaces_that_they_are():
    tokenizer = tokenizer_from_backend(like_gemma())
    compiler = compiler_for(tokenizer)
    pieces = {tokenizer.token(token_id) for token_id in said(compiler, {"regex": "[ \n]{40}"}, seed=0)}
    assert pieces > {"▁▁", "▁▁▁", "\n\n", "▁", "<0x20>", "<0x0A>"}
    compiler.close()
