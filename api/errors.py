"""Errors as OpenAI's clients expect them: the JSON form, the handlers of the app, and the API's own error types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import RequestError

MAX_MESSAGE_CHARS = 1000  # a message may quote the request; it must not send a megabyte of it back

RETRY_AFTER_S = 5  # where an error does not say itself when to try again
INTERNAL_ERROR = "the server met an unexpected error; its log has the details under this reply's x-request-id"


class BodyTooLargeError(RequestError):
    """The request's body is larger than the server takes."""

    status = 413

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(
            f"the request body is larger than {max_body_bytes} bytes; send less, or raise server.max_body_bytes",
            code="body_too_large",
        )


class BodyTimeoutError(RequestError):
    """The request's body did not arrive in time."""

    status = 408

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the request body did not arrive within {timeout_s:g} s; send it faster, or raise server.body_timeout_s",
            code="body_timeout",
        )


class ContentTypeError(RequestError):
    """The request's body is not said to be JSON."""

    status = 415

    def __init__(self, content_type: str) -> None:
        super().__init__(
            f"the content type must be application/json, got {content_type[:80]!r}", code="unsupported_media_type"
        )


class EngineNotReadyError(RequestError):
    """The engine cannot take requests now; `retry_after_s` says when it is worth asking again."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str, *, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, code="engine_not_ready")
        self.retry_after_s = retry_after_s


class RequestAbortedError(RequestError):
    """The server dropped the request before its answer was whole."""

    status = 503
    kind = "server_error"

    def __init__(self) -> None:
        super().__init__("the server aborted this request before its answer was complete", code="request_aborted")


class JSONReply(Response):
    """A JSON response, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_body(error: RequestError) -> dict[str, dict[str, str | None]]:
    """Return OpenAI's error object."""
    return _body(error.message, kind=error.kind, param=error.param, code=error.code)


def error_reply(error: RequestError) -> Response:
    """Return the response for an error that is the caller's to see."""
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(getattr(error, "retry_after_s", RETRY_AFTER_S))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is still on its way
    return JSONReply(error_body(error), status_code=error.status, headers=headers)


def internal_error_body() -> dict[str, dict[str, str | None]]:
    """Return the error object for what nobody foresaw: it says nothing of the inside."""
    return _body(INTERNAL_ERROR, kind="server_error", param=None, code="internal_error")


async def handle_request_error(request: Request, error: Exception) -> Response:
    """Answer a `RequestError` that left a route."""
    assert isinstance(error, RequestError)
    return error_reply(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette raises: unknown routes, wrong methods, a client that left while its body was read."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        message, code = f"there is no route {path!r}; GET /openapi.json lists them", "route_not_found"
    elif error.status_code == 405:
        allowed = " or ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message, code = f"{request.method} is not allowed for {path!r}; use {allowed}", "method_not_allowed"
    else:
        message, code = str(error.detail), None
    return _reply(_body(message, kind="invalid_request_error", param=None, code=code), error.status_code, error.headers)


def _reply(body: dict[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    return JSONReply(body, status_code=status, headers=dict(headers or {}))


def _body(message: str, *, kind: str, param: str | None, code: str | None) -> dict[str, dict[str, str | None]]:
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + " ..."
    # A message may quote text that is no valid Unicode, such as half a surrogate pair in a path.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
