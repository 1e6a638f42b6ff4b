"""Requests with a grammar for the tiny random model, and the tokens that transformers gives under its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured.token_table import TokenTable
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.tokenizer import Tokenizer
from tests.checkpoints import TINY, transformers_greedy

# The tiny model's tokenizer has a token for each byte and </s>; the model's own end is 2, and other ids are no text.
END, EOS_IDS = 256, [2, 256]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "json": StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
    "regex": StructuredOutputsParams(regex="([a-f]+[0-9] ?){2,5}"),
    "choice": StructuredOutputsParams(choice=["yes", "yes, but", "no", "none of these"]),
    "grammar": StructuredOutputsParams(grammar='root ::= "(" (root | [0-9]) ")" root?'),
    "json_object": StructuredOutputsParams(json_object=True),
}


def constrained(params: SamplingParams, constraint: StructuredOutputsParams) -> SamplingParams:
    """Parameters as an engine gets them: the constraint as a grammar, and an end that the tokenizer has."""
    return replace(params, structured_outputs_grammar=grammar_text(constraint), stop_token_ids=[END], ignore_eos=False)


def make_compiler(folder: Path) -> GrammarCompiler:
    """A compiler for a folder's tokenizer."""
    tokenizer = Tokenizer.from_source(str(folder))
    table = TokenTable.of(tokenizer, vocab_size=TINY["vocab_size"], eos_ids=EOS_IDS)
    return GrammarCompiler(lambda: (table, lambda text: tokenizer.encode(text, add_special_tokens=False)))


def masked_greedy(
    folder: Path, prompts: Sequence[list[int]], constraints: Sequence[StructuredOutputsParams], num_tokens: int
) -> list[list[int]]:
    """What transformers says where it may choose from each mask alone; the mask is made anew for each token."""
    compiler = make_compiler(folder)

    def answer(prompt: list[int], grammar: str) -> list[int]:
        def allowed(_: int, token_ids: np.ndarray) -> list[int]:
            matcher = compiler.matcher(grammar, [], token_ids.tolist()[len(prompt) :])
            (mask,) = compiler.masks.make([(matcher, [])])
            return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

        (tokens,) = transformers_greedy(folder, [prompt], num_tokens, allowed=allowed)
        ends = [index for index, token_id in enumerate(tokens) if token_id in EOS_IDS]
        return tokens[: ends[0] + 1] if ends else tokens

    answers = [answer(p, grammar_text(c)) for p, c in zip(prompts, constraints, strict=True)]
    compiler.close()
    return answers
