"""POST /v1/completions and POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from api.body import read_body
from api.chunks import ChatChunks, Chunks, CompletionChunks
from api.disconnect import run_until_disconnect
from api.errors import JSONReply
from api.from_engine import chat_answer, completion_answer
from api.generation import final_outputs, outputs_of
from api.reply import make_reply
from api.schemas.chat import ChatRequest
from api.schemas.completion import CompletionRequest
from api.schemas.sampling import SamplingFields
from api.sse import EventStream
from api.state import ServerState, server_state
from api.to_engine import Job, chat_job, completion_job
from jaxserve.outputs import RequestOutput

_log = logging.getLogger(__name__)

_LARGE_BODY_BYTES = 64 * 1024  # beyond it a chat template runs in a thread, for the sake of other clients' streams


async def create_completion(request: Request) -> Response | ASGIApp:
    """Answer POST /v1/completions."""
    state = server_state(request)
    state.check_ready()
    body = await read_body(request, CompletionRequest)
    state.check_model(body.model)
    job = completion_job(body, state.engine, request.state.request_id)
    _log_start(state, request, body, job)
    reply = make_reply(state, job, as_token_ids=body.return_tokens_as_token_ids, with_token_ids=body.return_token_ids)
    if body.stream:
        return EventStream(_events(state, job, CompletionChunks(reply, body)), request.state.request_id)
    outputs = await run_until_disconnect(final_outputs(state, job), request.receive)
    _log_end(state, job, outputs)
    return JSONReply(completion_answer(reply, body, outputs))


async def create_chat_completion(request: Request) -> Response | ASGIApp:
    """Answer POST /v1/chat/completions."""
    state = server_state(request)
    state.check_ready()
    body = await read_body(request, ChatRequest)
    state.check_model(body.model)
    make_job = partial(chat_job, body, state.engine, state.chat_template, request.state.request_id)
    is_large = len(await request.body()) > _LARGE_BODY_BYTES
    job = await run_in_threadpool(make_job) if is_large else make_job()
    _log_start(state, request, body, job)
    reply = make_reply(state, job, as_token_ids=body.return_tokens_as_token_ids, with_token_ids=body.return_token_ids)
    if body.stream:
        return EventStream(_events(state, job, ChatChunks(reply, body)), request.state.request_id)
    outputs = await run_until_disconnect(final_outputs(state, job), request.receive)
    _log_end(state, job, outputs)
    return JSONReply(chat_answer(reply, body, outputs[0]))


async def _events(state: ServerState, job: Job, chunks: Chunks) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs_of(state, job)) as outputs:
        async for prompt_index, output in outputs:
            if data := chunks.feed(prompt_index, output):
                yield data
    yield chunks.last()
    if state.config.enable_log_requests:
        usage = chunks.usage
        _log.info(
            "%s streamed %d prompt tokens and %d tokens",
            job.reply_id,
            usage.num_prompt_tokens,
            usage.num_completion_tokens,
        )


def _log_start(state: ServerState, request: Request, body: SamplingFields, job: Job) -> None:
    """Log sizes and parameters, never the text."""
    if not state.config.enable_log_requests:
        return
    parameters = body.model_dump(
        exclude_unset=True, exclude={"prompt", "messages", "documents", "chat_template_kwargs", "stop", "bad_words"}
    )
    _log.info(
        "%s %s: %d prompts, %s",
        job.reply_id,
        request.url.path,
        len(job.prompts),
        {name: value for name, value in parameters.items() if isinstance(value, (bool, int, float))},
    )


def _log_end(state: ServerState, job: Job, outputs: Sequence[RequestOutput]) -> None:
    if not state.config.enable_log_requests:
        return
    sequences = [sequence for output in outputs for sequence in output.outputs]
    _log.info(
        "%s answered %d prompt tokens with %d tokens",
        job.reply_id,
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(sequence.token_ids) for sequence in sequences),
    )
