"""Routes for those who run the server: /health, /ready, /ping, /version, /metrics, /openapi.json."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response

from api.errors import JSONReply
from api.openapi import openapi
from api.state import server_state
from jaxserve.errors import RequestError
from jaxserve.metrics import CONTENT_TYPE


async def health(request: Request) -> Response:
    """Answer GET /health: 200 while the process should be left alone, 503 when it should be replaced."""
    health = server_state(request).engine.health
    return JSONReply({"status": health.state.value}, status_code=200 if health.is_alive else 503)


async def ready(request: Request) -> Response:
    """Answer GET /ready: 200 while requests are taken."""
    state = server_state(request)
    health = state.engine.health
    try:
        state.check_ready()
    except RequestError:
        status = "draining" if state.in_flight.is_draining else health.state.value
        return JSONReply({"status": status, "detail": health.detail}, status_code=503)
    return JSONReply({"status": "ready", "detail": health.detail, "num_restarts": health.num_restarts})


async def ping(request: Request) -> Response:
    """Answer GET and POST /ping, which some platforms send instead of /health."""
    return await health(request)


async def show_version(request: Request) -> Response:
    """Answer GET /version."""
    return JSONReply({"version": _version()})


async def show_metrics(request: Request) -> Response:
    """Answer GET /metrics in Prometheus' text format."""
    metrics = server_state(request).metrics
    if metrics is None:
        return Response(b"", media_type=CONTENT_TYPE)
    return Response(await metrics.collect(), media_type=CONTENT_TYPE)


async def show_openapi(request: Request) -> Response:
    """Answer GET /openapi.json."""
    return JSONReply(openapi(_version()))


@cache
def _version() -> str:
    return version("jaxserve")
