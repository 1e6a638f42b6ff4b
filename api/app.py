"""`create_app`: the HTTP server as one ASGI app over an engine."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from api.disconnect import ClientDisconnectedError
from api.errors import handle_http_exception, handle_request_error
from api.middleware import ApiKey, BodyLimit, RequestScope
from api.routes import completions, models, service, tokens
from api.state import Metrics, ServerState
from api.token_names import TokenNames
from jaxserve.config import ServerSettings
from jaxserve.engine.client import EngineClient
from jaxserve.errors import RequestError
from jaxserve.tokenizer.chat_template import ChatTemplate

_CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; seen in metrics alone

_ROUTES = [
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", models.show_model, methods=["GET"]),
    Route("/v1/completions", completions.create_completion, methods=["POST"]),
    Route("/v1/chat/completions", completions.create_chat_completion, methods=["POST"]),
    Route("/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/health", service.health, methods=["GET"]),
    Route("/ready", service.ready, methods=["GET"]),
    Route("/ping", service.ping, methods=["GET", "POST"]),
    Route("/version", service.show_version, methods=["GET"]),
    Route("/metrics", service.show_metrics, methods=["GET"]),
    Route("/openapi.json", service.show_openapi, methods=["GET"]),
]


def create_app(
    engine: EngineClient,
    config: ServerSettings,
    *,
    metrics: Metrics | None = None,
    chat_template: ChatTemplate | None = None,
) -> Starlette:
    """Build the app. `chat_template` is the tokenizer's own unless given; `metrics` are shared with the engine client.

    The app neither starts nor stops the engine.
    """
    state = ServerState(
        engine=engine,
        config=config,
        metrics=metrics,
        token_names=TokenNames(engine.tokenizer),
        chat_template=chat_template or ChatTemplate.of_tokenizer(engine.tokenizer),
    )
    app = Starlette(
        routes=_ROUTES,
        middleware=_middleware(state),
        exception_handlers={
            RequestError: handle_request_error,
            HTTPException: handle_http_exception,
            ClientDisconnect: _no_answer,
            ClientDisconnectedError: _no_answer,
        },
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


def _middleware(state: ServerState) -> list[Middleware]:
    config = state.config
    middleware = [Middleware(RequestScope, state=state)]
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if config.api_key:
        middleware.append(Middleware(ApiKey, keys=config.api_key))
    middleware.append(Middleware(BodyLimit, max_body_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s))
    return middleware


async def _no_answer(request: Request, error: Exception) -> Response:
    """End a request whose client is gone."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
