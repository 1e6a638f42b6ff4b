"""What happens to every request before its route: an id, a last resort for errors, keys, a limit on the body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    JSONReply,
    RequestAbortedError,
    error_reply,
    internal_error_body,
)
from api.state import ServerState
from api.to_engine import is_request_id
from jaxserve.errors import AuthenticationError

PUBLIC_PATHS = frozenset({"/health", "/ping"})  # the only routes that need no key

_log = logging.getLogger(__name__)


class RequestScope:
    """Outermost: gives the request its id, counts it, and answers 500 where nothing else answered."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        start_s = time.monotonic()
        status = 0  # not answered yet

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._state.in_flight.enter()
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not self._state.in_flight.is_draining:
                raise
            # A shutdown that waits no longer. This is the top of the request's task, so the cancellation ends here.
            if not status:
                await error_reply(RequestAbortedError())(scope, receive, send_with_id)
        except Exception:
            if status:  # too late for another answer; the server cuts the connection
                raise
            _log.exception("%s failed: %s %s", request_id, scope["method"], scope["path"])
            await JSONReply(internal_error_body(), status_code=500)(scope, receive, send_with_id)
        finally:
            self._state.in_flight.leave()
            self._observe(scope, status, time.monotonic() - start_s)

    def _observe(self, scope: Scope, status: int, duration_s: float) -> None:
        if self._state.metrics is not None and status:
            handler = getattr(scope.get("route"), "path", "none")
            self._state.metrics.observe_http(
                handler=handler, method=scope["method"], status=status, duration_s=duration_s
            )


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-Id when it is fit to be repeated, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if is_request_id(given) else secrets.token_hex(16)


class ApiKey:
    """Refuses requests without one of the keys, on every route but `PUBLIC_PATHS`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _route_path(scope) in PUBLIC_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = AuthenticationError("a valid API key is required: send it as 'Authorization: Bearer <key>'")
        await error_reply(error)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        scheme, _, key = given.partition(b" ")
        # All keys are compared, so that the time tells nothing of which one was close.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _route_path(scope: Scope) -> str:
    """Return the path as the router sees it: without the prefix under which a proxy serves us."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


class BodyLimit:
    """Refuses bodies larger than `max_body_bytes`, told by their length or counted as they come, and slow ones."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            await error_reply(BodyTooLargeError(self._max_body_bytes))(scope, receive, send)
            return
        num_bytes = 0
        deadline_s: float | None = asyncio.get_running_loop().time() + self._timeout_s  # None: the body is there

        async def receive_counted() -> Message:
            nonlocal num_bytes, deadline_s
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeoutError(self._timeout_s) from None
            if message["type"] == "http.request":
                if not message.get("more_body", False):
                    deadline_s = None
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise BodyTooLargeError(self._max_body_bytes)
            return message

        await self._app(scope, receive_counted, send)
