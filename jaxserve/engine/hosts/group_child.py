"""`GroupChild`: the engine processes of all hosts, as the leader's supervisor sees them: one child."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jaxserve.config_parallel import ParallelSettings
from jaxserve.engine import wire
from jaxserve.engine.child import EngineChild
from jaxserve.engine.hosts.leader import Failure, HostGroup
from jaxserve.engine.hosts.session import HostSession
from jaxserve.errors import JaxserveError

WATCH_INTERVAL_S = 0.5
START_SILENCE_S = 30.0  # while it imports, traces and compiles, a process may be silent so long
LAST_ORDERS_S = 0.2
LAST_NEWS_S = 1.0  # after this host's engine process broke down: a follower's death may be why, and says so soon


class Pulse:
    """Whether an engine process with heartbeats still lives and gets on."""

    def __init__(self, parallel: ParallelSettings) -> None:
        self._silence_s = parallel.heartbeat_timeout_s
        self._start_s = max(parallel.heartbeat_timeout_s, START_SILENCE_S)
        self._step_s = parallel.step_timeout_s
        self._is_ready = False
        self._heard_s = time.monotonic()
        self._busy_s = 0.0

    def hear(self, message: wire.FromEngine | None) -> None:
        """Take note of any message."""
        self._heard_s = time.monotonic()
        if isinstance(message, wire.Heartbeat):
            self._busy_s = message.busy_s
        elif isinstance(message, wire.Ready):
            self._is_ready = True

    @property
    def trouble(self) -> str | None:
        """What is wrong, to come after "the engine process"."""
        limit_s = self._silence_s if self._is_ready else self._start_s
        if time.monotonic() - self._heard_s > limit_s:
            return f"was not heard for {limit_s:g} s"
        if self._busy_s > self._step_s:
            return f"was at one step for {self._busy_s:.0f} s"
        return None


class GroupChild:
    """One session of the group, with the interface of an `EngineChild`. Used once, closed by `end`."""

    def __init__(
        self, group: HostGroup, parallel: ParallelSettings, launch: Callable[[HostSession], EngineChild]
    ) -> None:
        self._group = group
        self._parallel = parallel
        self._launch = launch
        self._child: EngineChild | None = None
        self._watching: asyncio.Task[None] | None = None
        self._has_said_who_is_missing = False
        self._is_ready = False
        self._failure: Failure | None = None  # why all must end, where it is not this host's process that ended first

    @property
    def pid(self) -> int | None:
        """This host's engine process."""
        return None if self._child is None else self._child.pid

    @property
    def exit_text(self) -> str:
        """How it ended, for people."""
        if self._failure is not None:
            return f"was ended, because {self._failure.cause}"
        return "never ran" if self._child is None else self._child.exit_text

    def send(self, message: wire.ToEngine) -> None:
        """Hand a message to this host's engine process, which decides for all."""
        if self._child is not None:
            self._child.send(message)

    async def receive(self) -> wire.FromEngine | None:
        """The next message of this host's engine process; None once the session is over, on whatever host it ended."""
        if self._child is None:
            if self._group.missing and not self._has_said_who_is_missing:
                self._has_said_who_is_missing = True
                ranks = ", ".join(map(str, self._group.missing))
                return wire.Progress(f"waiting at {self._group.address} for node rank {ranks}")
            try:
                await self._group.gather()
            except JaxserveError as error:
                return wire.StartFailed(wire.WireError.of(error))
            self._child = self._launch(self._group.begin())
            self._pulse = Pulse(self._parallel)
            self._watching = asyncio.create_task(self._watch(self._child), name="group-watch")
        return await self._receive(self._child)

    async def end(self, *, timeout_s: float = 0.0) -> None:
        """End the processes of all hosts; this one's may take `timeout_s` for it."""
        if self._watching is not None:
            self._watching.cancel()
        try:
            if self._child is not None:
                await self._child.end(timeout_s=timeout_s)
        finally:
            self._group.end_session()

    async def _receive(self, child: EngineChild) -> wire.FromEngine | None:
        while isinstance(message := await child.receive(), wire.Heartbeat):
            self._pulse.hear(message)
        self._pulse.hear(message)
        if isinstance(message, wire.Ready):
            self._is_ready = True
        if message is not None:
            return message
        if self._failure is None and not child.was_killed:
            await asyncio.wait({self._group.failure}, timeout=LAST_NEWS_S)
            self._failure = self._group.failure.result() if self._group.failure.done() else None
        if self._failure is not None and self._failure.error is not None and not self._is_ready:
            return wire.StartFailed(self._failure.error)
        return None

    async def _watch(self, child: EngineChild) -> None:
        """Kill this host's process when the group fails elsewhere, or when it hangs."""
        while self._failure is None:
            await asyncio.wait({self._group.failure}, timeout=WATCH_INTERVAL_S)
            if self._group.failure.done():
                self._failure = self._group.failure.result()
            elif (trouble := self._pulse.trouble) is not None:
                self._failure = Failure(f"the one of node rank 0 {trouble}")
        self._group.end_session()
        await asyncio.sleep(LAST_ORDERS_S)  # the followers' processes go first: JAX aborts those that outlive this one
        child.kill()
