"""`ReplicasClient`: the `EngineClient` of an API server, whose engines are the replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from jaxserve.config import Config
from jaxserve.deploy import wire
from jaxserve.deploy.metrics import ReplicasMetrics
from jaxserve.deploy.prefix_index import prompt_hashes
from jaxserve.engine.client import EngineHealth, EngineState
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.preparation import PreparedRequest, RequestPreparer, model_info
from jaxserve.errors import (
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    ServerDrainingError,
)
from jaxserve.outputs import CompletionOutput, FinishReason, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.tokenizer import MAX_INLINE_CHARS, Tokenizer

logger = logging.getLogger(__name__)


class _ReplicaLostError(Exception):
    """This replica will not answer the request; another one may."""


@dataclass(slots=True, eq=False)
class _LiveRequest:
    """One request on its way."""

    prepared: PreparedRequest
    generate: bytes  # a `wire.Generate`
    hashes: bytes
    replica: str | None = None  # that has it
    avoid: list[str] = field(default_factory=list)  # replicas that failed it
    has_output: bool = False
    is_aborted: bool = False
    stream: DeploymentResponseGenerator[Any] | None = None


class ReplicasClient:
    """Checks and tokenises requests, sends each to a replica, and to another one if that dies before the first token.

    Made once an engine is ready; belongs to one event loop.
    """

    def __init__(
        self,
        config: Config,
        engines: DeploymentHandle[Any],
        tokenizer: Tokenizer,
        info: CoreInfo,
        metrics: ReplicasMetrics,
    ) -> None:
        self.tokenizer = tokenizer
        self.model_info = model_info(config, info)
        self.health = EngineHealth(state=EngineState.READY)  # set by whoever watches the replicas
        self._config = config
        self._engines = engines.options(stream=True)
        self._block_size = info.block_size
        self._metrics = metrics
        self._live: dict[str, _LiveRequest] = {}
        self._preparer = RequestPreparer(tokenizer, info, seed=config.model.seed, scheduler=config.scheduler)

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient.generate`."""
        options = {"priority": priority, "cache_salt": cache_salt, "add_special_tokens": add_special_tokens}
        prepared = await self._prepare(prompt, params, request_id=request_id, **options)
        if request_id in self._live:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a running request", param="request_id")
        live = self._live[request_id] = self._live_request(prepared, priority, cache_salt)
        try:
            while True:
                try:
                    async with aclosing(self._ask_a_replica(live)) as outputs:
                        async for output in outputs:
                            live.has_output = True
                            yield output
                    return
                except _ReplicaLostError as error:
                    self._check_may_retry(live, error)
        finally:
            self._live.pop(request_id, None)
            _cancel(live)

    async def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        live = self._live.get(request_id)
        if live is not None:
            live.is_aborted = True
            _cancel(live)

    def _live_request(self, prepared: PreparedRequest, priority: int, cache_salt: str | None) -> _LiveRequest:
        order = wire.Generate(
            # Several API servers, and clients that name their requests, may choose the same.
            request_id=f"{prepared.request_id}-{uuid.uuid4().hex}",
            prompt_token_ids=prepared.prompt_token_ids,
            params=replace(prepared.params, bad_words=None),  # they are in bad_words_token_ids now
            priority=priority,
            cache_salt=cache_salt,
        )
        hashes = b""
        if self._config.cache.enable_prefix_caching:
            hashes = prompt_hashes(prepared.prompt_token_ids, self._block_size, cache_salt)
        return _LiveRequest(prepared, wire.encode(order), hashes)

    async def _prepare(self, prompt: str | list[int], params: SamplingParams, **options: Any) -> PreparedRequest:
        is_long = isinstance(prompt, str) and len(prompt) > MAX_INLINE_CHARS
        if is_long or params.structured_outputs is not None:
            return await asyncio.to_thread(self._preparer.prepare, prompt, params, **options)
        return self._preparer.prepare(prompt, params, **options)

    async def _ask_a_replica(self, live: _LiveRequest) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one attempt; raises `_ReplicaLostError` where another replica might do."""
        live.replica = None
        # Serve gives the calls made in an HTTP request's context one id, by which its router looks up those that wait:
        # several prompts would be taken for one. In a context of its own each call is a request.
        stream = contextvars.Context().run(
            self._engines.generate.remote, live.generate, hashes=live.hashes, avoid=live.avoid
        )
        assert isinstance(stream, DeploymentResponseGenerator)
        live.stream = stream
        if live.is_aborted:
            _cancel(live)
        is_finished = False
        try:
            with _ray_errors_said_in_ours(live):
                async for data in stream:
                    output = self._on_message(live, wire.decode_from_replica(data))
                    if output is not None:
                        is_finished = output.finished
                        yield output
            live.stream = None  # it has ended by itself
            if not is_finished:
                raise _ReplicaLostError("its answer ended too soon")
        except _ReplicaLostError:
            if not live.is_aborted:
                raise
            yield _aborted(live.prepared)

    def _on_message(self, live: _LiveRequest, message: wire.FromReplica) -> RequestOutput | None:
        match message:
            case wire.Accepted(name):
                live.replica = name
                self._metrics.count_sent(name)
                return None
            case wire.Failed(error):
                failure = error.rebuild()
                if isinstance(failure, (EngineDeadError, ServerDrainingError)):
                    raise _ReplicaLostError(str(failure))
                raise failure
            case wire.Output(output):
                was_dropped = any(sequence.finish_reason is FinishReason.ABORT for sequence in output.outputs)
                if was_dropped and not live.is_aborted:
                    raise _ReplicaLostError("it was stopped")
                return replace(
                    output,
                    request_id=live.prepared.request_id,
                    prompt=live.prepared.prompt,
                    prompt_token_ids=live.prepared.prompt_token_ids,
                )

    def _check_may_retry(self, live: _LiveRequest, error: _ReplicaLostError) -> None:
        """Return when the request may go to another replica; raise what its client gets otherwise."""
        name = live.prepared.request_id
        logger.warning("%s: replica %s failed it: %s", name, live.replica or "(none yet)", error)
        if live.has_output:
            self._metrics.count_broken()
            raise EngineDeadError(
                "the engine that answered this request stopped before its answer was complete; send it again"
            )
        if len(live.avoid) >= self._config.deploy.max_num_retries:
            raise EngineDeadError(f"{len(live.avoid) + 1} engines stopped one after the other with this request")
        live.avoid.append(live.replica or "")
        self._metrics.count_retry()


@contextmanager
def _ray_errors_said_in_ours(live: _LiveRequest) -> Iterator[None]:
    try:
        yield
    except BackPressureError:
        raise QueueFullError("all engines are busy and the waiting queue is full; try again in a moment") from None
    except DeploymentUnavailableError:
        raise EngineDeadError("no engine runs; GET /ready says when requests are taken again") from None
    except RayTaskError as error:
        if live.is_aborted or isinstance(error, TaskCancelledError):
            raise _ReplicaLostError("it was told to stop") from error
        logger.exception("%s: the replica failed on it", live.prepared.request_id)
        raise RequestFailedError("the engine failed on this request; other requests were not touched") from error
    except (RayError, ReplicaUnavailableError) as error:  # deaths, in the several ways that Ray reports them
        raise _ReplicaLostError(type(error).__name__) from error


def _cancel(live: _LiveRequest) -> None:
    """Let the replica stop, if one is at it."""
    if live.stream is not None:
        live.stream.cancel()


def _aborted(prepared: PreparedRequest) -> RequestOutput:
    """The last output of a request that was aborted."""
    sequences = [
        CompletionOutput(index=index, text="", token_ids=[], finish_reason=FinishReason.ABORT)
        for index in range(prepared.params.n)
    ]
    return RequestOutput(
        request_id=prepared.request_id,
        prompt=prepared.prompt,
        prompt_token_ids=prepared.prompt_token_ids,
        outputs=sequences,
        finished=True,
    )
