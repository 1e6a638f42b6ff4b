"""Server-sent events: framing, and `EventStream`, the response that ends its work when the client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from api.disconnect import ClientDisconnectedError, run_until_disconnect
from api.errors import error_body, internal_error_body
from jaxserve.errors import RequestError

_log = logging.getLogger(__name__)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(data: Any) -> bytes:
    """Frame one JSON value as an event.

    >>> event({"a": 1})
    b'data: {"a":1}\\n\\n'
    """
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream:
    """An ASGI response of ready-made events.

    The status waits for the first event, so that whatever goes wrong before it is an ordinary error response. Later
    errors become an event, and end the stream without its end mark. A client that leaves closes the generator.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], request_id: str) -> None:
        self._events = events
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that left needs no response, and the server would not send one.
        with suppress(ClientDisconnectedError):
            await run_until_disconnect(self._pump(send), receive)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            last = b""
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except RequestError as error:
                last = event(error_body(error))
            except Exception:  # noqa: BLE001 - the status is sent already, so the client must hear of it here
                _log.exception("%s failed in the middle of its stream", self._request_id)
                last = event(internal_error_body())
            await send({"type": "http.response.body", "body": last, "more_body": False})
