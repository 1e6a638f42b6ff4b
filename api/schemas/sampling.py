"""`SamplingFields`: the fields that completions and chats share; their ranges are checked by `SamplingParams`."""

from __future__ import annotations

from pydantic import model_validator

from api.schemas.base import StreamOptions
from api.schemas.fields import FreeObject, LogitBias, StopStrings
from api.schemas.structured import ConstraintFields
from jaxserve.errors import InvalidRequestError


class SamplingFields(ConstraintFields):
    """How an answer is sampled, when it ends, and what comes back with it."""

    model: str | None = None  # one of the served names; left out, it is the served model
    stream: bool = False
    stream_options: StreamOptions | None = None

    n: int = 1
    temperature: float | None = None  # left out: the model's generation config, then 1
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None  # token id -> -100 to 100
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: StopStrings | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False

    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep the last so many; -1: as many as leave room for the answer
    prompt_logprobs: int | None = None
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # log-probabilities name tokens "token_id:<id>"

    priority: int = 0  # lower runs first, under the priority policy
    cache_salt: str | None = None  # cached blocks are shared only under the same salt
    request_id: str | None = None  # part of the reply's id, and in the server's log

    # Accepted because they change no answer: they are notes for a provider's accounting and routing.
    user: str | None = None
    metadata: FreeObject | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs does not go with stream=true", param="prompt_logprobs")
        if self.cache_salt == "":
            raise InvalidRequestError("cache_salt must not be an empty string", param="cache_salt")
        return self
