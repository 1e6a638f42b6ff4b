"""A server behind a real socket, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from api.app import create_app
from api.server import Server
from jaxserve.config import ServerSettings
from tests.fakes import FakeEngine


@dataclass
class Running:
    """A server in a thread of its own."""

    url: str
    port: int
    engine: FakeEngine
    server: Server
    loop: asyncio.AbstractEventLoop

    def begin_shutdown(self) -> None:
        self.loop.call_soon_threadsafe(self.server.begin_shutdown)


@contextmanager
def running(engine: FakeEngine, config: ServerSettings | None = None) -> Iterator[Running]:
    """Serve on a free port until the block ends."""
    config = config or ServerSettings(port=0, shutdown_timeout_s=0)
    started = threading.Event()
    ports: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    def on_started(port: int) -> None:
        ports.append(port)
        started.set()

    server = Server(create_app(engine, config), config, on_started=on_started)

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(10)
    run = Running(f"http://127.0.0.1:{ports[0]}", ports[0], engine, server, loops[0])
    try:
        yield run
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()
