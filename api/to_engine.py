"""From a checked request to what the engine takes: prompts, `SamplingParams`, and how to run them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.field_names import said_in
from api.schemas.chat import ChatRequest, ConversationFields
from api.schemas.completion import CompletionRequest
from api.schemas.sampling import SamplingFields
from jaxserve.engine.client import EngineClient, ModelInfo
from jaxserve.errors import ChatTemplateError, InvalidRequestError
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.tokenizer.chat_template import ChatTemplate

MAX_SEQUENCES = 1024  # prompts x n of one request
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything one HTTP request asks of the engine."""

    reply_id: str  # "cmpl-..." or "chatcmpl-..."
    prompts: Sequence[str | list[int]]
    field_names: dict[str, str]  # the engine's word -> the body's, where they differ
    params: SamplingParams
    add_special_tokens: bool
    priority: int
    cache_salt: str | None


def completion_job(request: CompletionRequest, engine: EngineClient, request_id: str) -> Job:
    """Turn a completion request into a job; raises `InvalidRequestError`."""
    for prompt in request.prompt:
        _check_prompt(prompt, request, engine)
    _check_num_sequences(len(request.prompt), request.n, engine.model_info)
    scores_prompt = request.echo and request.logprobs is not None
    names = _constraint_name(request)
    return Job(
        reply_id=f"cmpl-{reply_id(request, request_id)}",
        prompts=request.prompt,
        field_names=names,
        params=_sampling_params(
            request,
            engine.model_info,
            names,
            max_tokens=request.max_tokens or 1,  # with 0 the one token is left out of the reply
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if scores_prompt else request.prompt_logprobs,
        ),
        add_special_tokens=request.add_special_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def chat_job(request: ChatRequest, engine: EngineClient, template: ChatTemplate | None, request_id: str) -> Job:
    """Turn a chat request into a job; raises `InvalidRequestError`."""
    extra = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    prompt = render_conversation(request, template, extra)
    _check_num_sequences(1, request.n, engine.model_info)
    names = _constraint_name(request) | {"prompt": "messages", "logprobs": "top_logprobs"}
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens, names["max_tokens"] = request.max_completion_tokens, "max_completion_tokens"
    return Job(
        reply_id=f"chatcmpl-{reply_id(request, request_id)}",
        prompts=[prompt],
        field_names=names,
        params=_sampling_params(
            request,
            engine.model_info,
            names,
            max_tokens=max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
        ),
        add_special_tokens=request.add_special_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def render_conversation(
    request: ConversationFields, template: ChatTemplate | None, extra: dict[str, str] | None = None
) -> str:
    """Return the prompt the chat template makes of the messages."""
    if template is None:
        raise ChatTemplateError(
            "the served model has no chat template; send the prompt to /v1/completions, or start the server with "
            "--chat-template",
            param="messages",
        )
    return template.render(
        [message.for_template() for message in request.messages],
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        extra=(extra or {}) | (request.chat_template_kwargs or {}),
    )


def reply_id(request: SamplingFields, request_id: str) -> str:
    """Return the id that the reply carries: the body's own, or the HTTP request's."""
    if request.request_id is None:
        return request_id
    if not is_request_id(request.request_id):
        raise InvalidRequestError(
            "request_id must have 1 to 128 letters, digits or characters of _.:/+=@-", param="request_id"
        )
    return request.request_id


def is_request_id(text: str) -> bool:
    """Return True for an id that may go into logs, headers and replies as it is."""
    return _REQUEST_ID.fullmatch(text) is not None


def engine_request_id(job: Job, prompt_index: int) -> str:
    """Return a new id for the engine; clients may send the same id twice at once, so it has a part of its own."""
    return f"{job.reply_id}-{prompt_index}-{secrets.token_hex(4)}"


def _check_num_sequences(num_prompts: int, n: int, info: ModelInfo) -> None:
    limit = min(MAX_SEQUENCES, info.max_queued_requests)  # all of them wait at once before the first one runs
    if num_prompts * n > limit:
        raise InvalidRequestError(
            f"{num_prompts} prompts times n={n} are more than {limit} sequences; send several requests", param="n"
        )


def _check_prompt(prompt: str | list[int], request: CompletionRequest, engine: EngineClient) -> None:
    if not prompt:
        begins_itself = prompt == "" and bool(engine.tokenizer.encode("", request.add_special_tokens))
        if not begins_itself:
            raise InvalidRequestError("prompt must not be empty: it needs at least one token", param="prompt")
    if isinstance(prompt, list):
        check_token_ids("prompt", prompt, engine.model_info.vocab_size)


def check_token_ids(name: str, token_ids: list[int], vocab_size: int) -> None:
    """Raise unless every id is one of the vocabulary's."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(
            f"{name} holds token id {str(wrong)[:24]}, the vocabulary has 0 to {vocab_size - 1}", param=name
        )


def _constraint_name(request: SamplingFields) -> dict[str, str]:
    return {} if request.constraint_field is None else {"structured_outputs": request.constraint_field}


def _sampling_params(
    request: SamplingFields,
    info: ModelInfo,
    names: Mapping[str, str],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Fill in defaults and check; the model's generation config says what a field left out means."""
    output_kind: OutputKind = "delta" if request.stream else "final_only"
    with said_in(names):
        constraint = request.constraint()
    given = {name: getattr(request, name) for name in _DEFAULTED}
    chosen = {name: value for name, value in given.items() if value is not None}
    defaults = {name: info.default_sampling[name] for name in _DEFAULTED if name in info.default_sampling}
    params = SamplingParams(
        **(defaults | chosen),  # type: ignore[arg-type]  # names and types are SamplingParams' own
        n=request.n,
        logit_bias=request.logit_bias,
        allowed_token_ids=request.allowed_token_ids,
        bad_words=request.bad_words,
        structured_outputs=constraint,
        seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens,
        spaces_between_special_tokens=request.spaces_between_special_tokens,
        truncate_prompt_tokens=_prompt_limit(request.truncate_prompt_tokens, info.max_model_len, max_tokens),
        output_kind=output_kind,
    )
    with said_in(names):
        params.validate().validate_token_ids(info.vocab_size)
    return params


_DEFAULTED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _prompt_limit(truncate: int | None, max_model_len: int, max_tokens: int | None) -> int | None:
    """Return how many prompt tokens to keep; -1 means as many as leave room for the answer."""
    if truncate != -1:
        return truncate
    return max(1, max_model_len - (max_tokens or 1))
