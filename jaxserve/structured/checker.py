"""`GrammarChecker`: whether a grammar compiles within its limits, tried out in a process that may die of it."""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import IO

import msgspec

from jaxserve.config import API_KEY_VARIABLE
from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.structured.token_table import TokenTable

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
MAX_KNOWN = 1024  # grammars whose verdict is remembered


class GrammarChecker:
    """Owns the checker's process: started when it is first needed, and again after it died. Any thread may call it.

    A small schema can take minutes to compile ({"multipleOf": 1000700}), and one that is a chain of thousands of
    references overruns the stack. Compilers have limits, but no limits on these.
    """

    def __init__(self, make_table: Callable[[], TokenTable], *, timeout_s: float = 3.0) -> None:
        self._make_table = make_table
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[str, str] = OrderedDict()  # grammar -> what is wrong with it, the latest last

    def check(self, grammar: str) -> None:
        """Return if it compiles; raises `InvalidRequestError`. Takes milliseconds, at worst the timeout and a start."""
        with self._lock:
            verdict = self._verdicts.get(grammar)
            if verdict is None:
                verdict = self._verdicts[grammar] = self._try_out(grammar)
            self._verdicts.move_to_end(grammar)
            if len(self._verdicts) > MAX_KNOWN:
                self._verdicts.popitem(last=False)
        if verdict:
            raise InvalidRequestError(
                f"structured_outputs cannot be compiled: {verdict}", param="structured_outputs", code="invalid_grammar"
            )

    def close(self) -> None:
        """End the process, if there is one; a later check starts another."""
        with self._lock:
            self._end()

    def _try_out(self, grammar: str) -> str:
        process = self._process or self._start()
        try:
            answer = self._ask(process, grammar, self._timeout_s)
        except (OSError, EOFError):
            self._end()
            return "it is too large, or too deeply nested"
        if answer is None:
            self._end()
            return f"it takes longer than {self._timeout_s:g} s"
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        table = self._make_table()  # raises where grammars are impossible, before anything runs
        command = [sys.executable, "-P", "-m", "jaxserve.structured.checker_process"]
        # The child imports from where its parent does.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        environment.pop(API_KEY_VARIABLE, None)  # none of its business
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        try:
            ready = self._ask(self._process, table, START_TIMEOUT_S)
        except (OSError, EOFError):
            ready = None
        if ready != "ready":
            self._end()
            raise RequestFailedError("the process that checks grammars does not start; see the server's log")
        return self._process

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], question: str | TokenTable, timeout_s: float) -> str | None:
        """The answer to a line; None where none came in time, `OSError` or `EOFError` where the process died."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(question) + b"\n")
        process.stdin.flush()
        line = _read_line(process.stdout, time.monotonic() + timeout_s)
        return None if line is None else msgspec.json.decode(line, type=str)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.kill()
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except OSError:  # what it did not read
                logger.debug("the grammar checker died before it had read its input")


def _read_line(stream: IO[bytes], deadline_s: float) -> bytes | None:
    """The one line that comes; None at the deadline."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            return None
        part = stream.read1(65536)  # type: ignore[attr-defined]  # a BufferedReader
        if not part:
            raise EOFError
        line += part
    return line
