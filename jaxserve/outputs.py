"""What comes back: token deltas from the engine, and text for the user."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"  # the client left, or the server was told to drop it
    ERROR = "error"  # the engine failed on this sequence; see the error text


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural logarithm, from the raw logits (before temperature and masks)."""

    token_id: int  # the chosen token, or the prompt's own
    logprob: float
    rank: int  # 1 is the most likely token
    top_token_ids: list[int]  # most likely first, at most as many as were asked
    top_logprobs: list[float]


class TokenDelta(msgspec.Struct, omit_defaults=True, gc=False):
    """What one step added to one request; crosses from the engine to the API process.

    A step of 256 requests makes as many: a struct is made and sent in a third of a dataclass's time.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, when a stop token did
    error: str | None = None  # with FinishReason.ERROR
    is_error_by_request: bool = False  # what the request asks for cannot be; otherwise the engine failed on it
    logprobs: list[TokenLogprobs] | None = None  # one a token in token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole, once; first entry None
    num_cached_tokens: int | None = None  # with the first delta
    queued_s: float | None = None  # time waited before first scheduled, with the first delta
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's `n` sequences, so far (or what is new, with output_kind "delta")."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one a token in token_ids
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for EOS
    seed: int | None = None  # send it again with the same request to get the same answer
    text_offsets: list[int] | None = None  # start of each token's text in the whole generated text


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request's answer, so far or whole."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # with "delta" only the sequences that have news
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
