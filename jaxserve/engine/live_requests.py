"""`LiveRequests`: a client's requests between `generate` and their end, and the way of a delta to its request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.engine.output_processor import OutputProcessor
from jaxserve.engine.preparation import PreparedRequest
from jaxserve.errors import InvalidRequestError, JaxserveError
from jaxserve.metrics import RequestTimer, ServerMetrics
from jaxserve.outputs import RequestOutput, TokenDelta
from jaxserve.tokenizer.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request. The processor and the timer are there once the request is checked and submitted."""

    request_id: str
    sequence_ids: list[str] = field(default_factory=list)
    processor: OutputProcessor | None = None
    timer: RequestTimer | None = None
    error: JaxserveError | None = None
    is_aborted: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def unfinished_ids(self) -> list[str]:
        """The sequences that the engine may still be working on."""
        return self.processor.unfinished_ids if self.processor is not None else []

    async def next_output(self) -> RequestOutput:
        """Wait for news and return it; raises the error that ended the request. Not after the last output."""
        assert self.processor is not None
        while True:
            self._news.clear()
            if error := self.error or self.processor.error:
                raise error
            output = self.processor.take()
            if output is not None:
                return output
            await self._news.wait()

    def push(self, delta: TokenDelta, now_s: float) -> bool:
        """Take in a delta. True: a stop string ended the sequence, and the engine has to be told."""
        assert self.processor is not None and self.timer is not None
        self.timer.on_delta(delta, now_s)
        self._news.set()
        return self.processor.push(delta)

    def fail(self, error: JaxserveError) -> None:
        """End the request with an error, unless it is not submitted yet, or complete and only waits to be read."""
        if self.processor is not None and not self.processor.is_finished:
            self.error = error
            self._news.set()

    def abort(self) -> None:
        """End the request with what it has; one that is not submitted yet ends when it is."""
        self.is_aborted = True
        if self.processor is not None:
            self.processor.abort()
            self._news.set()


class LiveRequests:
    """All live requests of a client, by request id and by sequence id. Belongs to one event loop."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._by_id: dict[str, LiveRequest] = {}
        self._by_sequence: dict[str, LiveRequest] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, request_id: str) -> LiveRequest | None:
        """The request with this id."""
        return self._by_id.get(request_id)

    def ids(self) -> list[str]:
        """Ids of all live requests."""
        return list(self._by_id)

    def reserve(self, request_id: str) -> LiveRequest:
        """Take the id for a request that is about to be checked; raises `InvalidRequestError` where it is in use."""
        if request_id in self._by_id:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a running request", param="request_id")
        request = self._by_id[request_id] = LiveRequest(request_id)
        self._none_left.clear()
        return request

    def submit(self, request: LiveRequest, prepared: PreparedRequest, tokenizer: Tokenizer) -> None:
        """From now on deltas of the request's sequences find their way."""
        request.sequence_ids = [sequence.request_id for sequence in prepared.sequences]
        request.processor = OutputProcessor(prepared, tokenizer)
        request.timer = RequestTimer(
            metrics=self._metrics,
            params=prepared.params,
            num_prompt_tokens=len(prepared.prompt_token_ids),
            arrival_time_s=prepared.sequences[0].arrival_time_s,
        )
        for sequence_id in request.sequence_ids:
            self._by_sequence[sequence_id] = request
        if request.is_aborted:
            request.processor.abort()

    def push(self, deltas: list[TokenDelta]) -> list[str]:
        """Take in a step's deltas; returns the sequences that stop strings ended. Unknown ones are late and dropped."""
        now_s = time.monotonic()
        stopped: list[str] = []
        for delta in deltas:
            request = self._by_sequence.get(delta.request_id)
            if request is not None and request.push(delta, now_s):
                stopped.append(delta.request_id)
        return stopped

    def reject(self, sequence_ids: list[str], error: JaxserveError) -> None:
        """The engine did not take these sequences."""
        for sequence_id in sequence_ids:
            request = self._by_sequence.get(sequence_id)
            if request is not None:
                request.fail(error)

    def fail_all(self, make_error: Callable[[], JaxserveError]) -> None:
        """End every request that is not complete; each gets an error of its own."""
        for request in self._by_id.values():
            request.fail(make_error())

    def release(self, request: LiveRequest) -> None:
        """The request's iterator has ended, one way or another."""
        if request.processor is not None and request.timer is not None and request.error is None:
            request.processor.abort()
            request.timer.on_end(request.processor.num_output_tokens, request.processor.finish_reasons)
        for sequence_id in request.sequence_ids:
            del self._by_sequence[sequence_id]
        del self._by_id[request.request_id]
        if not self._by_id:
            self._none_left.set()

    async def wait_until_none_left(self) -> None:
        """Return when no request is live."""
        await self._none_left.wait()
