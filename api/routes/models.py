"""GET /v1/models and GET /v1/models/{id}: the served model, under each of its names."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.errors import JSONReply
from api.state import server_state
from jaxserve.engine.client import ModelInfo


async def list_models(request: Request) -> Response:
    """Answer GET /v1/models."""
    info = server_state(request).engine.model_info
    return JSONReply({"object": "list", "data": [_card(info, name) for name in info.served_names]})


async def show_model(request: Request) -> Response:
    """Answer GET /v1/models/{id}; ids may hold slashes."""
    state = server_state(request)
    name = request.path_params["id"]
    state.check_model(name)
    return JSONReply(_card(state.engine.model_info, name))


def _card(info: ModelInfo, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": info.created_s,
        "owned_by": "jaxserve",
        "root": info.root,
        "parent": None,
        "max_model_len": info.max_model_len,
    }
