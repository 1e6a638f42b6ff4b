"""`InProcessEngine`: an engine core in this process, driven to the end of a batch of requests; for `LLM`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from jaxserve.config import Config
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.engine.interrupts import held_interrupts
from jaxserve.engine.output_processor import OutputProcessor
from jaxserve.engine.preparation import PreparedRequest, RequestPreparer
from jaxserve.engine.process import Core
from jaxserve.errors import QueueFullError
from jaxserve.outputs import RequestOutput, TokenDelta
from jaxserve.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class InProcessEngine:
    """Owns a core and runs it in the caller's thread. Not thread-safe."""

    def __init__(self, config: Config, core: Core, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.preparer = RequestPreparer(
            self.tokenizer,
            core.info,
            seed=config.model.seed,
            scheduler=config.scheduler,
        )
        self._core = core

    @property
    def core_info(self) -> CoreInfo:
        """What is fixed since the core is ready."""
        return self._core.info

    def stats(self) -> EngineStats:
        """Where the core stands."""
        return self._core.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks."""
        return self._core.reset_prefix_cache()

    def shutdown(self) -> None:
        """End the core; nothing else may be called after."""
        self._core.shutdown()
        self.preparer.close()

    def run(
        self, requests: list[PreparedRequest], on_finished: Callable[[RequestOutput], object]
    ) -> list[RequestOutput]:
        """Run all requests (with output_kind "final_only") to their ends; the answers are in the requests' order.

        A sequence on which the engine fails ends with FinishReason.ERROR and a line in the log; the others go on.
        Whatever interrupts it (Ctrl-C, an error) leaves no request behind in the core. Ctrl-C takes effect when the
        step is whole; pressed again, at once, which the core may not survive.
        """
        waiting = deque(requests)
        running: dict[str, OutputProcessor] = {}  # by sequence
        outputs: dict[str, RequestOutput] = {}
        with held_interrupts() as deliver_interrupt:
            try:
                while waiting or running:
                    self._add_waiting(waiting, running)
                    for delta in self._core.step():
                        output = self._take_in(delta, running)
                        if output is not None:
                            outputs[output.request_id] = output
                            on_finished(output)
                    deliver_interrupt()
            finally:
                self._core.abort(list(running))
        return [outputs[request.request_id] for request in requests]

    def _add_waiting(self, waiting: deque[PreparedRequest], running: dict[str, OutputProcessor]) -> None:
        """Queue as many requests as the core takes; a refusal is the caller's error only when nothing runs."""
        while waiting:
            request = waiting[0]
            try:
                for sequence in request.sequences:
                    self._core.add_request(sequence)
            except QueueFullError:
                self._core.abort([sequence.request_id for sequence in request.sequences])
                if not running:
                    raise
                return
            waiting.popleft()
            processor = OutputProcessor(request, self.tokenizer)
            running.update({sequence.request_id: processor for sequence in request.sequences})

    def _take_in(self, delta: TokenDelta, running: dict[str, OutputProcessor]) -> RequestOutput | None:
        """Give a delta to its request; returns the answer when this was the last of it."""
        processor = running.get(delta.request_id)
        if processor is None:
            return None  # of a sequence that a stop string has ended
        if processor.push(delta):
            self._core.abort([delta.request_id])
        if delta.error is not None:
            logger.error("%s failed in the engine: %s", delta.request_id, delta.error)
        if delta.request_id not in processor.unfinished_ids:
            del running[delta.request_id]
        return processor.take()
