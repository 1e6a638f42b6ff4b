"""`EngineClient`: what the API and every other front end may ask of an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.tokenizer import Tokenizer


class EngineState(Enum):
    """Where the engine stands; only READY takes requests."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it died and is being started again
    DRAINING = "draining"  # shutting down: running requests finish, new ones are refused
    DEAD = "dead"  # it died too often, or never started


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """The engine's state with a sentence for people."""

    state: EngineState
    detail: str = ""
    num_restarts: int = 0
    num_hosts: int = 1

    @property
    def is_alive(self) -> bool:
        """Whether the server should be left alone. A single engine comes back by itself; of several hosts one may be
        gone for good, so whoever watches is told at once."""
        return self.state is not EngineState.DEAD and not (self.state is EngineState.RESTARTING and self.num_hosts > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a client may want to know of the served model."""

    served_names: tuple[str, ...]  # the first is the one replies carry
    root: str  # the model reference it was loaded from
    max_model_len: int
    vocab_size: int
    max_queued_requests: int  # sequences that may wait; a request of more is never taken
    created_s: int  # unix time of start
    fingerprint: str  # identifies weights, settings and code; replies carry it as system_fingerprint
    default_sampling: dict[str, float | int] = field(default_factory=dict)  # from generation_config.json


class EngineClient(Protocol):
    """Front door of an engine. Methods raise `RequestError`s; nothing else leaves them."""

    model_info: ModelInfo
    tokenizer: Tokenizer

    @property
    def health(self) -> EngineHealth: ...

    def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the answer as it grows; the last output has `finished` set.

        Checks the parameters, tokenises, checks lengths, and spreads `params.n` over sequences that share the prompt's
        blocks. Closing the iterator (or cancelling its task) aborts the request.
        `params.output_kind` says whether outputs are cumulative, deltas, or the last one alone.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator finishes with FinishReason.ABORT. Unknown ids are ignored."""
        ...
