"""POST /tokenize and POST /detokenize: what the model sees of a text, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api.body import check_fields, read_body, read_fields
from api.errors import JSONReply
from api.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from api.state import ServerState, server_state
from api.to_engine import check_token_ids, render_conversation


async def tokenize(request: Request) -> Response:
    """Answer POST /tokenize; a body with `messages` is a conversation, any other a prompt."""
    state = server_state(request)
    fields = await read_fields(request)
    if "messages" in fields:
        chat = check_fields(fields, TokenizeChatRequest)
        state.check_model(chat.model)
        return await _tokens_reply(state, chat, lambda: render_conversation(chat, state.chat_template))
    plain = check_fields(fields, TokenizePromptRequest)
    state.check_model(plain.model)
    return await _tokens_reply(state, plain, lambda: plain.prompt)


async def detokenize(request: Request) -> Response:
    """Answer POST /detokenize."""
    state = server_state(request)
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    check_token_ids("tokens", body.tokens, state.engine.model_info.vocab_size)
    text = await run_in_threadpool(state.engine.tokenizer.decode, body.tokens, False)
    return JSONReply({"prompt": text})


async def _tokens_reply(
    state: ServerState, body: TokenizePromptRequest | TokenizeChatRequest, make_text: Callable[[], str]
) -> Response:
    """Tokenise in a thread: a long text must not hold up the streams."""
    return JSONReply(await run_in_threadpool(lambda: _tokens(state, body, make_text())))


def _tokens(state: ServerState, body: TokenizePromptRequest | TokenizeChatRequest, text: str) -> dict[str, Any]:
    tokenizer = state.engine.tokenizer
    token_ids = tokenizer.encode(text, body.add_special_tokens)
    return {
        "count": len(token_ids),
        "max_model_len": state.engine.model_info.max_model_len,
        "tokens": token_ids,
        "token_strs": tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None,
    }
