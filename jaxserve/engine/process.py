"""The engine process: `python -m jaxserve.engine.process` runs one engine core and talks to its parent over a socket.

    argument a core to import before there is an order, or none
    stdin    one line of JSON (`LaunchOrder`), then silence; its end means that the parent is gone
    socket   messages of `wire`, both ways
    stderr   the log

It never outlives its parent, leaves Ctrl-C to it, ends cleanly on SIGTERM, and dies of any error that the core lets
out: the parent sees the death, fails the requests under way and starts a new one.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

import msgspec
import zmq

from jaxserve.engine import wire
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.engine.heap import freeze_heap
from jaxserve.engine.hosts.session import HostSession
from jaxserve.errors import JaxserveError, RequestError
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest

logger = logging.getLogger("jaxserve.engine.process")  # __name__ is "__main__" here

DEFAULT_CORE = "jaxserve.engine.core:EngineCore"
IDLE_POLL_MS = 200  # how long an idle engine sleeps before it looks for signals and for its parent
STATS_INTERVAL_S = 0.1
HEARTBEAT_INTERVAL_S = 0.5
SEND_LINGER_MS = 2000  # at the end, for the last messages to leave
ORPHAN_GRACE_S = 2.0  # for a clean end after the parent is gone
PR_SET_PDEATHSIG = 1
EXIT_START_FAILED = 3
EXIT_CORE_DIED = 4


class Core(Protocol):
    """What this process asks of an engine core; `EngineCore` is one."""

    info: CoreInfo

    @property
    def has_unfinished(self) -> bool: ...

    def add_request(self, request: EngineRequest) -> None: ...

    def abort(self, request_ids: list[str]) -> list[TokenDelta]: ...

    def step(self) -> list[TokenDelta]: ...

    def stats(self) -> EngineStats: ...

    def reset_prefix_cache(self) -> bool: ...

    def shutdown(self) -> None: ...


class LaunchOrder(msgspec.Struct, kw_only=True, frozen=True):
    """What the parent writes to the child's standard input."""

    endpoint: str  # ipc:// address to connect to
    config_json: str  # a `Config`; never on the command line, where others could read its keys
    core: str = DEFAULT_CORE  # "module:attribute" of the core's class
    parent_pid: int
    log_level: str = "INFO"
    hosts: HostSession | None = None  # where the model is spread over several


class EngineProcess:
    """The main loop: messages in, a step, deltas out. Owns the socket; the core is made in `start`."""

    def __init__(self, socket: zmq.Socket[bytes], make_core: Callable[[Callable[[str], None]], Core]) -> None:
        self._socket = socket
        self._make_core = make_core
        self._send_lock = threading.Lock()  # progress may come from the core's compile threads
        self._stats_time_s = 0.0
        self._is_stopping = False
        self._num_computed_tokens = 0  # at the last step
        self._step_sizes: list[int] = []  # of steps that no message has told of
        self._turn_s: float | None = None  # time.monotonic() of the main loop's last turn, once it runs
        self._core: Core

    def start(self) -> None:
        """Make the core, telling the parent how it goes; errors pass through."""
        self.send(wire.Progress(f"engine process {os.getpid()} started"))  # hears of us, and removes the socket's file
        self._core = self._make_core(lambda text: self.send(wire.Progress(text)))
        self.send(wire.Ready(self._core.info))

    def stop(self) -> None:
        """Leave the main loop after the step under way; may be called from a signal handler or another thread."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve until told to stop, then shut the core down."""
        try:
            while not self._is_stopping:
                self._turn_s = time.monotonic()
                self._receive(timeout_ms=0 if self._core.has_unfinished else IDLE_POLL_MS)
                if self._core.has_unfinished:
                    deltas = self._core.step()
                    self._note_step_size()
                    self._send_outputs(deltas)
        finally:
            self._core.shutdown()

    def _receive(self, *, timeout_ms: int) -> None:
        """Take in all messages that are there; wait up to `timeout_ms` for the first."""
        while not self._is_stopping and self._socket.poll(timeout_ms):
            self._handle(wire.decode_to_engine(self._socket.recv()))
            timeout_ms = 0

    def _handle(self, message: wire.ToEngine) -> None:
        match message:
            case wire.AddRequests():
                self._add(message.unpack())
            case wire.AbortRequests(request_ids):
                self._send_outputs(self._core.abort(request_ids))
            case wire.ResetPrefixCache(call_id):
                self.send(wire.CallResult(call_id, self._core.reset_prefix_cache()))
            case wire.Shutdown():
                self.stop()

    def _add(self, requests: list[EngineRequest]) -> None:
        """Give the core all sequences of a request, or none."""
        added: list[str] = []
        try:
            for request in requests:
                self._core.add_request(request)
                added.append(request.request_id)
        except RequestError as error:
            self._core.abort(added)
            names = [request.request_id for request in requests]
            self.send(wire.Rejected(names, wire.WireError.of(error)))

    def _send_outputs(self, deltas: list[TokenDelta]) -> None:
        """Send a step's deltas in one message, with the statistics when they are due."""
        now_s = time.monotonic()
        is_due = now_s - self._stats_time_s >= STATS_INTERVAL_S or not self._core.has_unfinished
        if is_due:
            self._stats_time_s = now_s
        if deltas or is_due:
            self.send(wire.StepOutputs(deltas, self._core.stats() if is_due else None, self._step_sizes))
            self._step_sizes = []

    def _note_step_size(self) -> None:
        num_computed_tokens = self._core.stats().num_computed_tokens
        if num_computed_tokens > self._num_computed_tokens:
            self._step_sizes.append(num_computed_tokens - self._num_computed_tokens)
            self._num_computed_tokens = num_computed_tokens

    def beat(self) -> None:
        """Tell the parent now and then that this process lives, and how long it has been at the same step."""

        def keep_telling() -> None:
            while True:
                self.send(wire.Heartbeat(0.0 if self._turn_s is None else time.monotonic() - self._turn_s))
                time.sleep(HEARTBEAT_INTERVAL_S)

        threading.Thread(target=keep_telling, name="heartbeat", daemon=True).start()

    def send(self, message: wire.FromEngine) -> None:
        """Hand a message to the socket; any thread may."""
        with self._send_lock:
            self._socket.send(wire.encode(message))


def main() -> int:
    """Run the engine process; the result is its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `spawn` blocked it; compilers would inherit that
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if len(sys.argv) > 1:
        with suppress(Exception):  # it comes again, and is told of, where the core is made
            importlib.import_module(sys.argv[1].partition(":")[0])
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent ended before it had an order
    order = msgspec.json.decode(line, type=LaunchOrder)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    logging.getLogger("jaxserve").setLevel(order.log_level)
    _die_with_parent(order.parent_pid)
    _watch_parent(order.parent_pid)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)  # never block, never drop: a step's outputs are small
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, SEND_LINGER_MS)
    socket.connect(order.endpoint)
    try:
        return _serve(socket, order)
    finally:
        context.destroy()


def _serve(socket: zmq.Socket[bytes], order: LaunchOrder) -> int:
    process = EngineProcess(socket, lambda on_progress: _make_core(order, on_progress))
    if order.hosts is not None:
        process.beat()
    try:
        process.start()
    except JaxserveError as error:
        process.send(wire.StartFailed(wire.WireError.of(error)))
        return EXIT_START_FAILED
    except Exception as error:
        logger.exception("the engine could not start")
        failure = JaxserveError(f"the engine could not start: {type(error).__name__}: {error}")
        process.send(wire.StartFailed(wire.WireError.of(failure)))
        return EXIT_START_FAILED
    signal.signal(signal.SIGTERM, lambda *_: process.stop())
    freeze_heap()
    try:
        process.run()
    except Exception:
        logger.exception("the engine died")
        return EXIT_CORE_DIED
    return 0


def _make_core(order: LaunchOrder, on_progress: Callable[[str], None]) -> Core:
    from jaxserve.config import Config

    module, _, attribute = order.core.partition(":")
    core_class: Any = getattr(importlib.import_module(module), attribute)
    config = Config.model_validate_json(order.config_json)
    if order.hosts is None:
        return core_class(config, on_progress=on_progress)
    from jaxserve.engine.hosts.plans import connect

    return core_class(config, on_progress=on_progress, hosts=connect(order.hosts))


def _exit_on_signal(signal_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal_number)


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process with its parent, where it can (Linux)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            logger.warning("prctl(PR_SET_PDEATHSIG) failed: %s", os.strerror(ctypes.get_errno()))
    if os.getppid() != parent_pid:  # it died before we asked
        raise SystemExit("the parent process is gone")


def _watch_parent(parent_pid: int) -> None:
    """End this process when standard input ends or the parent changes, even if the core hangs."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1) and os.getppid() == parent_pid:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _run() -> NoReturn:
    """Run `main` and end now. After a failure or a signal nothing is waited for: compile threads and device runtimes
    may hang, and the parent sees a death only when the process is gone. Nor are other hosts, for which JAX waits."""
    try:
        exit_code = main()
    except SystemExit as ended:
        exit_code = ended.code
    jax = sys.modules.get("jax")
    if exit_code or (jax is not None and jax.distributed.is_initialized()):
        if isinstance(exit_code, str):
            logger.error("%s", exit_code)
        logging.shutdown()
        os._exit(exit_code if isinstance(exit_code, int) else int(exit_code is not None))
    sys.exit(0)


if __name__ == "__main__":
    _run()
