"""`ServerState`: what the routes share, and which requests are in flight, so that a shutdown can wait for them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from api.errors import EngineNotReadyError
from api.token_names import TokenNames
from jaxserve.config import ServerSettings
from jaxserve.engine.client import EngineClient, EngineState
from jaxserve.errors import ModelNotFoundError, ServerDrainingError
from jaxserve.tokenizer.chat_template import ChatTemplate

ABORT_GRACE_S = 2.0  # for aborted requests to tell their clients

_log = logging.getLogger(__name__)


class Metrics(Protocol):
    """What the API tells of its replies, and shows of the server; `ServerMetrics` is one."""

    def observe_http(self, *, handler: str, method: str, status: int, duration_s: float) -> None: ...

    async def collect(self) -> bytes: ...


@dataclass(slots=True)
class InFlight:
    """HTTP requests being answered, and the engine's requests behind them."""

    is_draining: bool = False
    num_http: int = 0
    request_ids: set[str] = field(default_factory=set)  # the engine's
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Count an HTTP request in."""
        self.num_http += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count an HTTP request out."""
        self.num_http -= 1
        if not self.num_http:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when `timeout_s` passed first."""
        if not self.num_http:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """One app's engine, settings and counters; the routes get it with `server_state(request)`."""

    engine: EngineClient
    config: ServerSettings
    metrics: Metrics | None
    token_names: TokenNames
    chat_template: ChatTemplate | None  # None: chats are refused
    in_flight: InFlight = field(default_factory=InFlight)

    def check_ready(self) -> None:
        """Raise unless the engine takes requests now."""
        health = self.engine.health
        if self.in_flight.is_draining or health.state is EngineState.DRAINING:
            raise ServerDrainingError
        if health.state is EngineState.READY:
            return
        if health.state is EngineState.DEAD:
            raise EngineNotReadyError("the engine is down and will not come back by itself", retry_after_s=60)
        raise EngineNotReadyError(f"the engine is {health.state.value}; GET /ready says when it takes requests")

    def check_model(self, name: str | None) -> None:
        """Raise unless `name` is one of the served model's names; None is always right."""
        served = self.engine.model_info.served_names
        if name is not None and name not in served:
            raise ModelNotFoundError(f"the model {name[:200]!r} does not exist; this server serves {', '.join(served)}")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, give those in flight `timeout_s` to finish, then abort them and let them say so."""
        self.in_flight.is_draining = True
        _log.info("shutting down: %d requests have %g s to finish", self.in_flight.num_http, timeout_s)
        if await self.in_flight.wait_idle(timeout_s):
            return
        _log.warning("aborting %d requests that did not finish in time", self.in_flight.num_http)
        for request_id in list(self.in_flight.request_ids):
            await self.engine.abort(request_id)
        await self.in_flight.wait_idle(ABORT_GRACE_S)


def server_state(request: Request) -> ServerState:
    """Return the state of the app that received the request."""
    return request.app.state.server
