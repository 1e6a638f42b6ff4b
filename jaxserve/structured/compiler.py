"""`GrammarCompiler`: the engine's grammars, compiled in a thread of its own and kept while they are in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLTokenizer

from jaxserve.errors import TokenizerError
from jaxserve.structured.masks import MaskMaker
from jaxserve.structured.matcher import GrammarMatcher
from jaxserve.structured.token_table import Encode, TokenTable, compile_grammar

MAX_KEPT = 128  # compiled grammars; ordinary ones take some 100 kB each
STACK_BYTES = 256 * 2**20  # so that whatever compiled in a checker's stack compiles here


class GrammarCompiler:
    """Compiles what has passed a `GrammarChecker`. The vocabulary is loaded with the first grammar."""

    def __init__(self, load: Callable[[], tuple[TokenTable, Encode]]) -> None:
        self._load = load
        self._parts: _Parts | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()  # by text, the latest last
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def masks(self) -> MaskMaker:
        """What makes masks of its matchers; there once a grammar is compiled."""
        assert self._parts is not None, "a matcher comes first"
        return self._parts.masks

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """Begin, unless it is done or under way. The result stays at the grammar's beginning: copy it."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = self._submit(grammar)
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
        return future

    def matcher(self, grammar: str, end_ids: Iterable[int], output: list[int]) -> GrammarMatcher:
        """A matcher behind the tokens `output`; waits for the compiler. EOS and `end_ids` end the sequence."""
        compiled = self.compile(grammar).result()
        assert self._parts is not None
        matcher = GrammarMatcher(compiled.deep_copy(), {*self._parts.eos_ids, *end_ids})
        matcher.consume(output)
        return matcher

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, grammar: str) -> Future[LLMatcher]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
            before = threading.stack_size(STACK_BYTES)
            try:
                return self._thread.submit(self._compile, grammar)  # starts the thread
            finally:
                threading.stack_size(before)
        return self._thread.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        if self._parts is None:
            self._parts = _Parts(*self._load())
        return compile_grammar(self._parts.tokenizer, grammar)


class _Parts:
    """What is made of the vocabulary once."""

    def __init__(self, table: TokenTable, encode: Encode) -> None:
        self.tokenizer: LLTokenizer = table.tokenizer(encode)
        self.masks = MaskMaker(table)
        self.eos_ids = table.eos_ids


def no_vocabulary() -> tuple[TokenTable, Encode]:
    """What an engine loads that has no tokenizer: nothing."""
    raise TokenizerError("this engine has no tokenizer to compile grammars for")
