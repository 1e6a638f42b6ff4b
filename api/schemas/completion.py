"""`CompletionRequest`: the body of POST /v1/completions."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from api.schemas import unsupported
from api.schemas.fields import Prompts
from api.schemas.sampling import SamplingFields
from jaxserve.errors import InvalidRequestError

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    """Text in, text out. `echo` with `max_tokens=0` scores the prompt alone."""

    unsupported: ClassVar = unsupported.COMPLETION

    prompt: Prompts  # text, token ids, or a list of either
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    logprobs: int | None = None  # alternatives a token, 0 to 20
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens must be at least 1, or 0 with echo=true to score the prompt", param="max_tokens"
            )
        return self
