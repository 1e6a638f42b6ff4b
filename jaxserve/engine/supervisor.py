"""`EngineSupervisor`: keeps an engine process running, passes its messages on, and says how it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from jaxserve.engine import wire
from jaxserve.engine.child import Child
from jaxserve.engine.client import EngineHealth, EngineState
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.errors import JaxserveError

logger = logging.getLogger(__name__)

DEATH_WINDOW_S = 300.0  # deaths longer ago are forgiven
MAX_BACKOFF_S = 30.0
END_TIMEOUT_S = 5.0  # for the engine to end by itself


class EngineSupervisor:
    """Owns the engine process and its restarts.

    # STARTING -> READY -> RESTARTING -> READY ...
    #                |         `-> DEAD (too many deaths)
    #                `-> DRAINING -> DEAD (stopped)
    """

    def __init__(
        self,
        launch: Callable[[], Child],
        *,
        on_message: Callable[[wire.FromEngine], None],
        on_death: Callable[[str], None],
        on_restart: Callable[[CoreInfo], None],
        on_progress: Callable[[str], None],
        max_restarts: int,
        backoff_s: float,
        num_hosts: int = 1,
    ) -> None:
        """`max_restarts` within `DEATH_WINDOW_S`; the first restart is at once, the second after `backoff_s`.

        `on_restart` hears of what a new engine has to offer; a `JaxserveError` of it refuses the engine.
        """
        self.health = EngineHealth(state=EngineState.STARTING, num_hosts=num_hosts)
        self._launch_child = launch
        self._on_message = on_message
        self._on_death = on_death
        self._on_restart = on_restart
        self._on_progress = on_progress
        self._max_restarts = max_restarts
        self._backoff_s = backoff_s
        self._death_times_s: deque[float] = deque()
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine process's id, while there is one."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> CoreInfo:
        """Start the first engine process and wait until it is ready; raises what kept it from starting."""
        try:
            info = await self._launch()
        except BaseException as error:
            self._set_state(EngineState.DEAD, str(error))
            raise
        self._set_state(EngineState.READY)
        self._task = asyncio.create_task(self._watch(), name="engine-supervisor")
        return info

    def send(self, message: wire.ToEngine) -> None:
        """Hand a message to the engine; lost while there is none."""
        if self._child is not None:
            self._child.send(message)

    def drain(self) -> None:
        """From now on the health is DRAINING, and a dead engine stays dead."""
        if self.health.state is not EngineState.DEAD:
            self._set_state(EngineState.DRAINING)

    async def stop(self) -> None:
        """End the engine process. May be called twice, and at any time."""
        self._set_state(EngineState.DEAD, self.health.detail or "the server was shut down")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._child is not None:
            child, self._child = self._child, None
            await child.end(timeout_s=END_TIMEOUT_S)

    async def _launch(self, accept: Callable[[CoreInfo], None] = lambda info: None) -> CoreInfo:
        child = self._child = self._launch_child()
        try:
            while True:
                match await child.receive():
                    case wire.Progress(text):
                        self._on_progress(text)
                    case wire.Ready(info):
                        accept(info)
                        return info
                    case wire.StartFailed(error):
                        raise error.rebuild()
                    case None:
                        raise JaxserveError(f"the engine process {child.exit_text} while it started; see its log")
        except BaseException:
            await child.end()
            self._child = None
            raise

    async def _watch(self) -> None:
        """Pass messages on as long as the engine lives; when it dies, say so and start it again, within limits."""
        is_running = True
        try:
            while is_running:
                await self._pass_on_messages()
                is_running = await self._restart(await self._bury())
        except Exception as error:
            logger.exception("the supervision of the engine failed")
            self._set_state(EngineState.DEAD, f"internal error: {type(error).__name__}: {error}")
            self._on_death(self.health.detail)

    async def _pass_on_messages(self) -> None:
        child = self._child
        while child is not None and (message := await child.receive()) is not None:
            self._on_message(message)

    async def _bury(self) -> str:
        """Clear away the dead child; returns how it ended."""
        assert self._child is not None
        cause = f"the engine process {self._child.exit_text}"
        child, self._child = self._child, None
        await child.end()
        return cause

    async def _restart(self, cause: str) -> bool:
        """Bring up a new engine after a death; False when there were too many, or when the server is ending."""
        while self.health.state not in (EngineState.DRAINING, EngineState.DEAD):
            num_deaths = self._count_death()
            if num_deaths > self._max_restarts:
                self._set_state(EngineState.DEAD, f"{cause}; it died {num_deaths} times in {DEATH_WINDOW_S:.0f} s")
                break
            self._set_state(EngineState.RESTARTING, cause)
            logger.error("%s; starting it again (%d of %d)", cause, num_deaths, self._max_restarts)
            self._on_death(cause)
            if num_deaths > 1:
                await asyncio.sleep(min(MAX_BACKOFF_S, self._backoff_s * 2 ** (num_deaths - 2)))
            try:
                await self._launch(self._on_restart)
            except JaxserveError as error:
                cause = str(error)
                continue
            self.health = replace(self.health, num_restarts=self.health.num_restarts + 1)
            self._set_state(EngineState.READY)
            return True
        logger.error("%s; it is not started again", cause)
        self._on_death(cause)
        return False

    def _count_death(self) -> int:
        """Deaths within the window, this one included."""
        now_s = time.monotonic()
        self._death_times_s.append(now_s)
        while now_s - self._death_times_s[0] > DEATH_WINDOW_S:
            self._death_times_s.popleft()
        return len(self._death_times_s)

    def _set_state(self, state: EngineState, detail: str = "") -> None:
        self.health = replace(self.health, state=state, detail=detail)
