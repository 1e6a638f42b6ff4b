"""`ProcessEngineClient`: the `EngineClient` whose engine runs in a process of its own, watched and started again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from jaxserve.config import Config
from jaxserve.engine import wire
from jaxserve.engine.child import Child, EngineChild
from jaxserve.engine.client import EngineHealth, EngineState, ModelInfo
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.engine.hosts.group_child import GroupChild
from jaxserve.engine.hosts.leader import HostGroup
from jaxserve.engine.live_requests import LiveRequests
from jaxserve.engine.preparation import PreparedRequest, RequestPreparer, load_tokenizer, model_info
from jaxserve.engine.process import DEFAULT_CORE
from jaxserve.engine.supervisor import EngineSupervisor
from jaxserve.errors import EngineDeadError, JaxserveError, ServerDrainingError
from jaxserve.metrics import ServerMetrics
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.tokenizer import MAX_INLINE_CHARS, Tokenizer

logger = logging.getLogger(__name__)


class ProcessEngineClient:
    """Owns the engine process. All methods belong to one event loop.

    `start`, then any number of `generate`, then `drain` and `shutdown`; or `async with`.
    """

    model_info: ModelInfo  # this and the next two are set by `start`
    core_info: CoreInfo
    tokenizer: Tokenizer

    def __init__(
        self,
        config: Config,
        *,
        core: str = DEFAULT_CORE,
        metrics: ServerMetrics | None = None,
        on_progress: Callable[[str], None] | None = None,
        backoff_s: float = 0.5,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """`core` is the core's class as "module:attribute"; `backoff_s` the pause before the second restart.

        `process` came from `spawn` and is the first engine process, of one host; without it one is started.
        """
        self._waiting_process = process
        self.metrics = metrics or ServerMetrics(
            model_name=config.model.served_names[0], prefix=config.server.metrics_prefix
        )
        self._config = config
        self._core = core
        self._hosts = HostGroup(config) if config.parallel.nnodes > 1 else None
        self._supervisor = EngineSupervisor(
            self._launch,
            on_message=self._on_message,
            on_death=self._on_death,
            on_restart=self._on_restart,
            on_progress=on_progress or (lambda text: logger.info("engine: %s", text)),
            max_restarts=config.server.max_num_engine_restarts,
            backoff_s=backoff_s,
            num_hosts=config.parallel.nnodes,
        )
        self._live = LiveRequests(self.metrics)
        self._calls: dict[int, asyncio.Future[bool]] = {}
        self._call_ids = itertools.count()
        self._tokenizing = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check-grammar")  # may take seconds
        self._preparer: RequestPreparer | None = None

    async def __aenter__(self) -> ProcessEngineClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    @property
    def health(self) -> EngineHealth:
        """The engine's state; only READY takes requests."""
        return self._supervisor.health

    @property
    def num_live_requests(self) -> int:
        """Requests whose iterators have not ended."""
        return len(self._live)

    @property
    def engine_pid(self) -> int | None:
        """The engine process's id, while there is one."""
        return self._supervisor.pid

    async def start(self) -> None:
        """Start the engine process and wait until it is ready; raises what kept it from starting."""
        starting = asyncio.create_task(self._start_engine())
        loading = asyncio.get_running_loop().run_in_executor(self._tokenizing, load_tokenizer, self._config.model)
        try:
            # Either may fail long before the other is done.
            await asyncio.wait({starting, loading}, return_when=asyncio.FIRST_EXCEPTION)
            for future in (loading, starting):
                if future.done():
                    future.result()
        except BaseException as error:
            starting.cancel()
            loading.cancel()
            await asyncio.gather(starting, loading, return_exceptions=True)
            if self._hosts is not None and isinstance(error, JaxserveError):
                await self._hosts.close(error)
            await self.shutdown()
            raise
        self.tokenizer = loading.result()
        self.model_info = model_info(self._config, starting.result())
        self._take_over(starting.result())

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
        self._check_ready()
        request = self._live.reserve(request_id)
        try:
            options = {"priority": priority, "cache_salt": cache_salt, "add_special_tokens": add_special_tokens}
            prepared = await self._prepare(prompt, params, request_id=request_id, **options)
            self._check_ready()
            self._live.submit(request, prepared, self.tokenizer)
            if not request.is_aborted:
                self._supervisor.send(wire.AddRequests.of(prepared.sequences))
            is_finished = False
            while not is_finished:
                output = await request.next_output()
                is_finished = output.finished
                yield output
        finally:
            self._abort_sequences(request.unfinished_ids)
            self._live.release(request)

    async def abort(self, request_id: str) -> None:
        """See `EngineClient.abort`."""
        request = self._live.get(request_id)
        if request is not None:
            self._abort_sequences(request.unfinished_ids)
            request.abort()

    async def reset_prefix_cache(self) -> bool:
        """Let no new request find the cached blocks; False without a prefix cache."""
        self._check_ready()
        call_id = next(self._call_ids)
        call = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._supervisor.send(wire.ResetPrefixCache(call_id))
            return await call
        finally:
            del self._calls[call_id]

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the running ones finish; True when they did before `timeout_s` had passed."""
        self._supervisor.drain()
        if not len(self._live):
            return True
        try:
            await asyncio.wait_for(self._live.wait_until_none_left(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def shutdown(self) -> None:
        """End the running requests with FinishReason.ABORT, then the engine process. May be called twice."""
        self._supervisor.drain()
        for request_id in self._live.ids():
            await self.abort(request_id)
        await self._supervisor.stop()
        if self._waiting_process is not None:  # for an order that never came
            self._waiting_process.kill()
            self._waiting_process.communicate()
        if self._hosts is not None:
            await self._hosts.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._checking.shutdown(wait=False, cancel_futures=True)
        self._close_preparer()

    async def _start_engine(self) -> CoreInfo:
        if self._hosts is not None:
            await self._hosts.open()
        return await self._supervisor.start()

    def _launch(self) -> Child:
        if self._hosts is None:
            process, self._waiting_process = self._waiting_process, None
            return EngineChild.launch(self._config, core=self._core, process=process)
        parallel = self._config.parallel
        return GroupChild(
            self._hosts, parallel, lambda hosts: EngineChild.launch(self._config, core=self._core, hosts=hosts)
        )

    async def _prepare(self, prompt: str | list[int], params: SamplingParams, **options: Any) -> PreparedRequest:
        assert self._preparer is not None, "the client is started"
        prepare = partial(self._preparer.prepare, prompt, params, **options)
        if params.structured_outputs is not None:
            return await asyncio.get_running_loop().run_in_executor(self._checking, prepare)
        if isinstance(prompt, str) and len(prompt) > MAX_INLINE_CHARS:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, prepare)
        return prepare()

    def _take_over(self, info: CoreInfo) -> None:
        """Serve what this engine offers."""
        self.core_info = info
        self.metrics.set_core_info(info)
        self._close_preparer()
        self._preparer = RequestPreparer(
            self.tokenizer,
            info,
            seed=self._config.model.seed,
            scheduler=self._config.scheduler,
        )

    def _close_preparer(self) -> None:
        if self._preparer is not None:
            self._preparer.close()

    def _check_ready(self) -> None:
        health = self._supervisor.health
        if health.state is EngineState.DRAINING:
            raise ServerDrainingError
        if health.state is not EngineState.READY:
            raise EngineDeadError(f"the engine is {health.state.value}: {health.detail or 'try again in a moment'}")

    def _abort_sequences(self, sequence_ids: list[str]) -> None:
        if sequence_ids:
            self._supervisor.send(wire.AbortRequests(sequence_ids))

    def _on_message(self, message: wire.FromEngine) -> None:
        match message:
            case wire.StepOutputs(deltas, stats, step_sizes):
                self._abort_sequences(self._live.push(deltas))
                for num_tokens in step_sizes:
                    self.metrics.iteration_tokens.observe(num_tokens)
                if stats is not None:
                    self.metrics.set_engine_stats(stats)
            case wire.Rejected(sequence_ids, error):
                self._live.reject(sequence_ids, error.rebuild())
            case wire.CallResult(call_id, value):
                call = self._calls.get(call_id)
                if call is not None and not call.done():
                    call.set_result(value)
            case _:
                raise AssertionError(f"unexpected message from a ready engine: {message!r}")

    def _on_restart(self, info: CoreInfo) -> None:
        """Another engine may have room for less, but what it answers must be what the first one would."""
        if (info.fingerprint, info.vocab_size) != (self.core_info.fingerprint, self.core_info.vocab_size):
            raise EngineDeadError(
                f"the engine that was started again serves another model ({info.fingerprint}, not "
                f"{self.core_info.fingerprint}): its files were changed; restart the server"
            )
        self._take_over(info)
        created_s = self.model_info.created_s
        self.model_info = replace(model_info(self._config, info), created_s=created_s)

    def _on_death(self, cause: str) -> None:
        """Nothing that ran in the engine survives it."""
        self.metrics.engine_died(is_restarting=self.health.state is EngineState.RESTARTING)
        message = f"{cause} while this request ran"
        self._live.fail_all(lambda: EngineDeadError(message))
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineDeadError(message))
