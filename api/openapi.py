"""The OpenAPI description of the routes, generated from the request schemas."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from api.schemas.chat import ChatRequest
from api.schemas.completion import CompletionRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest

_BODIES = {
    "/v1/completions": (CompletionRequest,),
    "/v1/chat/completions": (ChatRequest,),
    "/tokenize": (TokenizePromptRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
}
_GETS = {
    "/v1/models": "The served models",
    "/v1/models/{id}": "One served model",
    "/health": "Whether the process is alive; needs no key",
    "/ready": "Whether requests are taken",
    "/ping": "The same as /health",
    "/version": "The server's version",
    "/metrics": "Prometheus metrics",
}
_REF = "#/components/schemas/{model}"


@cache
def openapi(version: str) -> dict[str, Any]:
    """Return the whole description."""
    models = [(model, "validation") for group in _BODIES.values() for model in group]
    _, definitions = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]  # a literal, widened
    paths: dict[str, Any] = {path: {"get": _operation(text)} for path, text in _GETS.items()}
    paths["/v1/models/{id}"]["get"]["parameters"] = [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    for path, group in _BODIES.items():
        references = [{"$ref": _REF.format(model=model.__name__)} for model in group]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        operation = _operation(" ".join((group[0].__doc__ or "").split()))
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "OK"}, "4XX": {"description": "OpenAI's error"}}}
