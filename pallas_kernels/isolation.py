"""Runs named pieces of work in a child process that may fail, die or hang: each is accounted for, the others still run.

A wrong GPU kernel can hang its process, or leave it with a context in which everything fails. So the work is done by a
child, which tells when it begins and ends a piece, and is replaced where it goes silent or dies:

    parent  run_isolated(command, ["a", "b", "c"])           child 1  begins a, ends a, begins b, ... silence
            kills child 1, b is an error, and starts         child 2  begins c, ends c
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

_MARK = "\x1e"  # begins a line of ours in the child's output; libraries may print what they like
_SAID_CHARACTERS = 600  # of an error, in an outcome
_LAST_LINES = 3  # of a dead child's stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a piece of work: its value (anything JSON can hold), or what went wrong."""

    name: str
    value: Any = None
    error: str | None = None
    seconds: float = 0.0


def serve(
    prepare: Callable[[list[str]], Callable[[str], Any]], *, is_usable: Callable[[], bool] = lambda: True
) -> None:
    """In the child: does the works whose names stand in the first line of the input, as a JSON list.

    `prepare` is told all names and gives what does one: it returns a work's value or raises. `is_usable` tells after
    an error whether the next one can still succeed here; if not, the process ends, for the parent to start another.
    """
    names = json.loads(sys.stdin.readline())
    run = prepare(names)
    for name in names:
        _tell({"begin": name})
        begin_s = time.perf_counter()
        said: dict[str, Any]
        try:
            said = {"value": run(name)}
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is this work's outcome, not the next one's
            traceback.print_exc()
            said = {"error": shortened(f"{type(error).__name__}: {error}")}
        _tell(said | {"end": name, "seconds": time.perf_counter() - begin_s})
        if "error" in said and not is_usable():
            sys.exit(3)


def run_isolated(
    command: Sequence[str],
    names: Sequence[str],
    *,
    silence_s: float,
    limit_s: float,
    environ: Mapping[str, str] | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """An outcome for each of `names`, in order; `command` starts a process that calls `serve`.

    A work, or the start of a child, may take `silence_s`; all together `limit_s`. What is not done by then is named
    as not reached.
    """
    end_s = time.monotonic() + limit_s
    outcomes: list[Outcome] = []
    while remaining := list(names[len(outcomes) :]):
        if time.monotonic() < end_s:
            with _Child(command, remaining, environ) as child:
                outcomes += child.follow(remaining, silence_s=silence_s, end_s=end_s, on_outcome=on_outcome)
            continue
        for name in remaining:
            outcomes.append(Outcome(name=name, error=f"not reached in {limit_s:.0f} s"))
            on_outcome(outcomes[-1])
    return outcomes


def shortened(text: str) -> str:
    """An error of a compiler may be pages long; its beginning says what it is."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _SAID_CHARACTERS else flat[: _SAID_CHARACTERS - 4] + " ..."


def _tell(said: Mapping[str, Any]) -> None:
    sys.stdout.write(f"\n{_MARK}{json.dumps(said)}\n")
    sys.stdout.flush()


class _Child:
    """A running child and what it says; leaving it kills it with all that it started."""

    def __init__(self, command: Sequence[str], names: Sequence[str], environ: Mapping[str, str] | None) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child is followed
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(os.environ if environ is None else environ),
            text=True,
            start_new_session=True,
        )
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stream:  # it may be dead already
            stream.write(json.dumps(list(names)) + "\n")

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._errors.close()

    def follow(
        self, names: Sequence[str], *, silence_s: float, end_s: float, on_outcome: Callable[[Outcome], None]
    ) -> list[Outcome]:
        """Outcomes of the first few works, one at least: until all are done, or the child is of no more use."""
        outcomes: list[Outcome] = []

        def add(outcome: Outcome) -> None:
            outcomes.append(outcome)
            on_outcome(outcome)

        begun: str | None = None
        begin_s = time.monotonic()
        while len(outcomes) < len(names):
            patience_s = min(begin_s + silence_s, end_s) - time.monotonic()
            try:
                said = self._said.get(timeout=max(patience_s, 0.0))
            except queue.Empty:
                waited_s = time.monotonic() - begin_s
                self._kill()
                what = "no answer" if begun else "not ready"
                add(Outcome(name=names[len(outcomes)], error=f"{what} after {waited_s:.0f} s", seconds=waited_s))
                return outcomes
            if said is None:
                return self._died(names, outcomes, add, begun, time.monotonic() - begin_s)
            begin_s = time.monotonic()
            begun = said.get("begin")
            if "end" in said:
                add(
                    Outcome(name=said["end"], value=said.get("value"), error=said.get("error"), seconds=said["seconds"])
                )
        return outcomes

    def _died(
        self,
        names: Sequence[str],
        outcomes: list[Outcome],
        add: Callable[[Outcome], None],
        begun: str | None,
        seconds: float,
    ) -> list[Outcome]:
        """The work that killed it has an outcome; where it died of none, at its start, no other would fare better."""
        if begun is None and outcomes:
            return outcomes  # it ended itself after an error, for another to go on
        error = f"the process ended with status {self._process.wait()}: {self._last_words()}"
        for name in [begun] if begun is not None else names:
            add(Outcome(name=name, error=shortened(error), seconds=seconds))
        return outcomes

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(_MARK):
                    self._said.put(json.loads(line[len(_MARK) :]))
        self._said.put(None)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:]) or "it said nothing"

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join(timeout=1.0)
