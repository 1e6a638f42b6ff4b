"""`EngineChild`: one engine process as its parent sees it, with the socket to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Protocol

import msgspec
import zmq
import zmq.asyncio

from jaxserve.config import Config
from jaxserve.engine import wire
from jaxserve.engine.hosts.session import HostSession
from jaxserve.engine.process import LaunchOrder
from jaxserve.engine.spawn import spawn
from jaxserve.errors import ConfigError

LAST_MESSAGES_S = 0.05  # how long to listen on after the process has ended
MAX_SOCKET_PATH = 100  # bytes; the kernel takes 103 (macOS) to 107 (Linux)


class Child(Protocol):
    """What a supervisor asks of the engine process, or of those of several hosts."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exit_text(self) -> str: ...

    def send(self, message: wire.ToEngine) -> None: ...

    async def receive(self) -> wire.FromEngine | None: ...

    async def end(self, *, timeout_s: float = 0.0) -> None: ...


class EngineChild:
    """A running engine process. Made by `launch` on the event loop's thread, used once, closed by `end`.

    The socket lies in a folder of its own that nobody else may enter; it is removed as soon as the child has connected.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        context: zmq.asyncio.Context,
        socket: zmq.asyncio.Socket,
        socket_dir: Path,
    ) -> None:
        self._process = process
        self._context = context
        self._socket = socket
        self._socket_dir = socket_dir
        self._receiving: asyncio.Future[bytes] | None = None
        self._has_fallen_silent = False
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()

    @classmethod
    def launch(
        cls,
        config: Config,
        *,
        core: str,
        hosts: HostSession | None = None,
        process: subprocess.Popen[bytes] | None = None,
    ) -> EngineChild:
        """Start the process, or give its order to one that waits; its messages tell how that goes."""
        socket_dir = _make_socket_dir()
        context = zmq.asyncio.Context()
        try:
            socket = _bind(context, socket_dir)
            process = process or spawn()
        except BaseException:
            context.destroy(linger=0)
            shutil.rmtree(socket_dir)
            raise
        child = cls(process, context, socket, socket_dir)
        child._write_order(
            LaunchOrder(
                endpoint=_endpoint(socket_dir),
                config_json=config.model_dump_json(exclude={"server": {"api_key"}}),
                core=core,
                parent_pid=os.getpid(),
                log_level=config.server.log_level.upper(),
                hosts=hosts,
            )
        )
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended_well(self) -> bool:
        """Whether the process ended because it was told to."""
        return self._process.returncode == 0

    @property
    def was_killed(self) -> bool:
        """Whether something outside ended it: it would not have ended so by itself, whatever befell it."""
        return self._process.returncode == -signal.SIGKILL

    @property
    def exit_text(self) -> str:
        """How the process ended, for people."""
        code = self._process.returncode
        if code is None:
            return "still runs"
        if self.was_killed:
            return "was killed by SIGKILL (by hand, or for lack of memory)"
        if code < 0:
            return f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"

    def send(self, message: wire.ToEngine) -> None:
        """Hand a message to the socket; never blocks. To a process that has ended it is lost."""
        self._socket.send(wire.encode(message))

    async def receive(self) -> wire.FromEngine | None:
        """The next message; None when the process has ended and all it said was heard."""
        if self._has_fallen_silent and not await self._socket.poll(0):
            return None
        self._receiving = asyncio.ensure_future(self._socket.recv())
        try:
            data = await self._receiving
        except asyncio.CancelledError:
            if self._has_fallen_silent:
                return None
            raise
        self._remove_socket_dir()
        return wire.decode_from_engine(data)

    def kill(self) -> None:
        """Kill the process now; `receive` tells of its end."""
        self._process.kill()

    async def end(self, *, timeout_s: float = 0.0) -> None:
        """Ask the process to end, kill it when it has not after `timeout_s`, and let go of everything."""
        try:
            if timeout_s > 0 and not self._exited.done():
                self.send(wire.Shutdown())
                await asyncio.wait({self._exited}, timeout=timeout_s)
        finally:
            self._process.kill()
            self._close()
        await self._exited

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._remove_socket_dir()
        self._context.destroy(linger=0)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        try:
            loop.call_soon_threadsafe(self._set_exited, code)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _set_exited(self, code: int) -> None:
        self._exited.set_result(code)
        # What it sent before it died is in the socket's buffers, and comes within this time.
        asyncio.get_running_loop().call_later(LAST_MESSAGES_S, self._fall_silent)

    def _fall_silent(self) -> None:
        self._has_fallen_silent = True
        if self._receiving is not None:
            self._receiving.cancel()

    def _write_order(self, order: LaunchOrder) -> None:
        stdin: IO[bytes] | None = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(msgspec.json.encode(order) + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return  # it is dead already, which `receive` reports

    def _remove_socket_dir(self) -> None:
        if self._socket_dir.exists():
            shutil.rmtree(self._socket_dir)


def _make_socket_dir() -> Path:
    socket_dir = Path(tempfile.mkdtemp(prefix="jaxserve-"))  # mode 0700
    if len(os.fsencode(_endpoint(socket_dir))) > MAX_SOCKET_PATH:
        socket_dir.rmdir()
        raise ConfigError(
            f"the temporary folder {tempfile.gettempdir()} has too long a name to hold a unix socket; "
            f"set TMPDIR to a shorter one, such as /tmp"
        )
    return socket_dir


def _endpoint(socket_dir: Path) -> str:
    return f"ipc://{socket_dir}/engine"


def _bind(context: zmq.asyncio.Context, socket_dir: Path) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)  # sending never blocks; the engine reads between any two steps
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(_endpoint(socket_dir))
    return socket
