"""Doing a request's work only as long as its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class ClientDisconnectedError(Exception):
    """The client left before its answer was ready; there is nobody to answer."""


async def run_until_disconnect(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Run `work` to its end, or cancel it when the client leaves and raise `ClientDisconnectedError`.

    The request's body must have been read. Cancelling this call cancels the work as well.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        for pending in (task, watch):
            pending.cancel()
        # The work closes its generators, which aborts the engine's requests, before anybody goes on.
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
