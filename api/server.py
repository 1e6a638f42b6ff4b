"""`serve`: runs the app under uvicorn until a signal, then lets running requests finish.

first SIGINT or SIGTERM   new requests get 503; running ones have shutdown_timeout_s seconds
then                      what still runs is aborted, and its clients are told
second signal             everything ends at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette

from api.protocol import Protocol
from api.state import ABORT_GRACE_S, ServerState
from jaxserve.config import ServerSettings

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CANCEL_GRACE_S = 0.5  # for what a forced end cuts off
_KEEP_ALIVE_S = 75  # longer than the 60 s after which common proxies drop an idle connection


async def serve(
    app: Starlette,
    config: ServerSettings,
    *,
    on_started: Callable[[int], None] | None = None,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve until a signal came and running requests ended. Call it in the main thread, for signals to arrive.

    `on_started` gets the port once requests are taken. `on_drain` runs when the shutdown begins, beside the requests
    that finish; it may tell the engine to refuse new work. It is cancelled when it takes much longer than they do.
    `sockets` are listened on instead of the config's host and port.
    """
    server = Server(app, config, on_started=on_started, on_drain=on_drain)
    await server.serve(sockets)


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that calls `serve`, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # Windows has none
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class Server(uvicorn.Server):
    """uvicorn's server, with a shutdown that drains before it closes the door."""

    def __init__(
        self,
        app: Starlette,
        config: ServerSettings,
        *,
        on_started: Callable[[int], None] | None = None,
        on_drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(_uvicorn_config(app, config))
        self._state: ServerState = app.state.server
        self._timeout_s = config.shutdown_timeout_s
        self._on_started = on_started
        self._on_drain = on_drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            self._on_started(self.servers[0].sockets[0].getsockname()[1])

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals while serving. Unlike uvicorn, do not raise them again: a drained end is a good end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, end at once."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_shutdown)
        else:
            self.should_exit = True

    def begin_shutdown(self) -> None:
        """Do what a signal does; call it in the event loop."""
        if self._drain_task is not None:
            _log.warning("second signal: ending at once")
            self._drain_task.cancel()
            self.should_exit = self.force_exit = True
            return
        self._drain_task = asyncio.ensure_future(self._drain())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, and cut off what a forced end left running."""
        await super().shutdown(sockets)
        tasks = list(self.server_state.tasks)
        if self.force_exit:  # otherwise uvicorn has cancelled them
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_GRACE_S)

    async def _drain(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                hook = tasks.create_task(self._tell_drain())
                await self._state.drain(self._timeout_s)
                await asyncio.wait((hook,), timeout=ABORT_GRACE_S)
                hook.cancel()
        finally:
            self.should_exit = True

    async def _tell_drain(self) -> None:
        try:
            if self._on_drain is not None:
                await self._on_drain()
        except Exception:  # noqa: BLE001 - a failing hook must not keep the server from ending
            _log.exception("the drain hook failed")


def _uvicorn_config(app: Starlette, config: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        root_path=config.root_path,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,  # logging is set up by whoever starts us
        log_level=config.log_level,
        access_log=config.enable_log_requests,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(ABORT_GRACE_S),
    )
