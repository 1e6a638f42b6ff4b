"""`Reply`: what every form of an answer needs of its request, and the token counts of an answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from api.errors import RequestAbortedError
from api.logprobs import LogprobForms
from api.state import ServerState
from api.to_engine import Job
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import CompletionOutput, FinishReason, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The frame of one answer: its head, and what the request wants in it."""

    reply_id: str
    model: str
    fingerprint: str
    params: SamplingParams
    tokenizer: Tokenizer
    forms: LogprobForms
    with_token_ids: bool
    created_s: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that an answer and each of its chunks begin with; `kind` is OpenAI's `object`."""
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def index(self, prompt_index: int, sequence: CompletionOutput) -> int:
        """Return a sequence's place among all choices: prompt by prompt."""
        return prompt_index * self.params.n + sequence.index


def make_reply(state: ServerState, job: Job, *, as_token_ids: bool, with_token_ids: bool) -> Reply:
    """Make the frame of the answer to a job."""
    info = state.engine.model_info
    return Reply(
        reply_id=job.reply_id,
        model=info.served_names[0],
        fingerprint=info.fingerprint,
        params=job.params,
        tokenizer=state.engine.tokenizer,
        forms=LogprobForms(state.token_names, as_token_ids),
        with_token_ids=with_token_ids,
    )


@dataclass(slots=True)
class Usage:
    """Token counts of an answer so far."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        """Count a prompt; once, however many sequences answer it."""
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def finish_reason(sequence: CompletionOutput) -> str | None:
    """Return OpenAI's word for the end of a sequence; an end that is no answer raises."""
    if sequence.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError
    if sequence.finish_reason is FinishReason.ERROR:
        raise RequestFailedError("the engine failed on this request; other requests were not touched")
    return None if sequence.finish_reason is None else sequence.finish_reason.value


def prompt_text(output: RequestOutput, reply: Reply) -> str:
    """Return the prompt as `echo` shows it."""
    if output.prompt is not None and reply.params.truncate_prompt_tokens is None:
        return output.prompt
    return reply.tokenizer.decode(output.prompt_token_ids, reply.params.skip_special_tokens)
