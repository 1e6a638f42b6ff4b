"""The grammar checker's process: compiles grammars that may take for ever, all memory, or the process with them.

    stdin    one line of JSON with a `TokenTable`, then one with a grammar's text each
    stdout   a line each: "" or what is wrong with it

It ends with its input. What it holds costs nobody else anything when it dies.
"""

from __future__ import annotations

import resource
import sys
import time

import msgspec

from jaxserve.structured.masks import MaskMaker
from jaxserve.structured.matcher import GrammarMatcher
from jaxserve.structured.token_table import TokenTable, compile_grammar

MAX_DATA_BYTES = 2**30  # in all
MAX_CPU_S = 30  # a grammar; the parent is less patient, unless it is gone


def main() -> None:
    """Answer until the input ends."""
    lines = sys.stdin.buffer
    table = msgspec.json.decode(lines.readline(), type=TokenTable)
    tokenizer = table.tokenizer()
    masks = MaskMaker(table, num_threads=1)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    _answer("ready")
    for line in lines:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + MAX_CPU_S, hard))
        matcher = GrammarMatcher(compile_grammar(tokenizer, msgspec.json.decode(line, type=str)), table.eos_ids)
        if not matcher.error:
            masks.make([(matcher, [])])  # some limits are met only here
        _answer(matcher.error)


def _answer(text: str) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(text) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
