"""`CompilingRequests`: requests that wait for their grammar before they join the scheduler's queue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from jaxserve.errors import JaxserveError, QueueFullError
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.structured.compiler import GrammarCompiler

logger = logging.getLogger(__name__)


class CompilingRequests:
    """Has grammars compiled beside the engine's loop, so that a large one makes nobody else wait."""

    def __init__(self, compiler: GrammarCompiler, *, max_requests: int) -> None:
        self._compiler = compiler
        self._max_requests = max_requests
        self._held: dict[str, tuple[EngineRequest, Future[Any]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, request: EngineRequest) -> bool:
        """Keep a request whose grammar is not compiled yet; False for any other. `QueueFullError` where many wait."""
        grammar = request.sampling_params.structured_outputs_grammar
        if grammar is None:
            return False
        future = self._compiler.compile(grammar)
        if future.done() and future.exception() is None:
            return False
        if len(self._held) >= self._max_requests:
            raise QueueFullError(f"{len(self._held)} requests wait for their grammars already; try again later")
        self._held[request.request_id] = request, future
        return True

    def release(self, add: Callable[[EngineRequest], None]) -> list[TokenDelta]:
        """Give those whose grammar is there to `add`; returns the deltas of those that end here instead."""
        deltas: list[TokenDelta] = []
        for request, future in [held for held in self._held.values() if held[1].done()]:
            try:
                if (error := future.exception()) is not None:
                    raise JaxserveError(f"its grammar cannot be compiled: {error}") from error
                add(request)
            except QueueFullError:
                return deltas
            except JaxserveError as error:
                logger.error("%s: %s", request.request_id, error)
                deltas.append(TokenDelta(request.request_id, finish_reason=FinishReason.ERROR, error=str(error)))
            del self._held[request.request_id]
        return deltas

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """End requests that are held; unknown ids are passed over."""
        held = [request_id for request_id in request_ids if self._held.pop(request_id, None) is not None]
        return [TokenDelta(request_id, finish_reason=FinishReason.ABORT) for request_id in held]

    def wait(self, timeout_s: float) -> None:
        """Until one of them can go on; returns at once where none is held."""
        wait([future for _, future in self._held.values()], timeout_s, return_when=FIRST_COMPLETED)
