"""POST /tokenize and POST /detokenize: what the model sees of a text, and back."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api.body import read_body
from api.errors import JSONReply
from api.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from api.state import ServerState, server_state
from api.to_engine import check_token_ids, render_conversation


async def tokenize(request: Request) -> Response:
    """Answer POST /tokenize; a body with `messages` is a conversation, any other a prompt."""
    state = server_state(request)
    if _has_messages(await request.body()):
        body = await read_body(request, TokenizeChatRequest)
        state.check_model(body.model)
        text = render_conversation(body, state.chat_template)
    else:
        body = await read_body(request, TokenizePromptRequest)
        state.check_model(body.model)
        text = body.prompt
    return JSONReply(await run_in_threadpool(_tokens, state, text, body.add_special_tokens, body.return_token_strs))


async def detokenize(request: Request) -> Response:
    """Answer POST /detokenize."""
    state = server_state(request)
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    check_token_ids("tokens", body.tokens, state.engine.model_info.vocab_size)
    text = await run_in_threadpool(state.engine.tokenizer.decode, body.tokens, False)
    return JSONReply({"prompt": text})


def _has_messages(data: bytes) -> bool:
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # read_body says what is wrong with it
    return isinstance(fields, dict) and fields.get("messages") is not None


def _tokens(state: ServerState, text: str, add_special_tokens: bool, return_token_strs: bool) -> dict[str, Any]:
    tokenizer = state.engine.tokenizer
    token_ids = tokenizer.encode(text, add_special_tokens)
    return {
        "count": len(token_ids),
        "max_model_len": state.engine.model_info.max_model_len,
        "tokens": token_ids,
        "token_strs": tokenizer.convert_ids_to_tokens(token_ids) if return_token_strs else None,
    }
