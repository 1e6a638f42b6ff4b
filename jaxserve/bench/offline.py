"""Offline runs: requests through an engine core in this process, or through an engine process, with their times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxserve.bench.statistics import RequestTimes
from jaxserve.bench.workload import BenchRequest
from jaxserve.config import Config
from jaxserve.errors import RequestFailedError
from jaxserve.outputs import FinishReason
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.client import EngineClient
    from jaxserve.engine.process import Core

# Greedy, and as long as asked for whatever the model says.
_PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, seed=0, output_kind="delta")


def config_for(config: Config, num_requests: int) -> Config:
    """The config with room for all requests in the waiting queue: offline, they come all at once."""
    room = max(config.scheduler.max_queued_requests, num_requests)
    return config.with_values(max_queued_requests=room)


def run_in_core(core: Core, requests: Sequence[BenchRequest]) -> tuple[list[RequestTimes], float]:
    """Run all requests at once to their ends; returns their times and the seconds it took. No text is made."""
    begin_s = time.perf_counter()
    times: dict[str, RequestTimes] = {}
    for index, request in enumerate(requests):
        request_id = f"bench-{index}"
        core.add_request(engine_request(request_id, request))
        times[request_id] = RequestTimes(sent_s=begin_s, num_prompt_tokens=len(request.prompt_token_ids))
    while core.has_unfinished:
        deltas = core.step()
        now_s = time.perf_counter()
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise RequestFailedError(f"the engine failed on a request: {delta.error}")
            if delta.token_ids:
                times[delta.request_id].arrivals_s.append(now_s)
                times[delta.request_id].num_output_tokens += len(delta.token_ids)
    return list(times.values()), time.perf_counter() - begin_s


async def run_in_client(client: EngineClient, requests: Sequence[BenchRequest]) -> tuple[list[RequestTimes], float]:
    """Run all requests at once through an engine client; text is made, as for a user."""
    begin_s = time.perf_counter()
    times = await asyncio.gather(*(_run_one(client, f"bench-{i}", request) for i, request in enumerate(requests)))
    return times, time.perf_counter() - begin_s


async def _run_one(client: EngineClient, request_id: str, request: BenchRequest) -> RequestTimes:
    times = RequestTimes(sent_s=time.perf_counter(), num_prompt_tokens=len(request.prompt_token_ids))
    params = replace(_PARAMS, max_tokens=request.output_len, detokenize=True)
    async for output in client.generate(request.prompt_token_ids, params, request_id=request_id):
        num_tokens = sum(len(sequence.token_ids) for sequence in output.outputs)
        if num_tokens:
            times.arrivals_s.append(time.perf_counter())
            times.num_output_tokens += num_tokens
    return times


def engine_request(request_id: str, request: BenchRequest) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling_params=replace(_PARAMS, max_tokens=request.output_len),
        arrival_time_s=time.monotonic(),
    )


Run = Callable[[Sequence[BenchRequest]], tuple[list[RequestTimes], float]]


class OfflineEngine:
    """A ready engine to run requests on; a context manager that brings it up and down.

    In this process (`EngineCore` alone) by default; with `in_process` false as the server has it: in a process of its
    own, with the tokenizer and detokenizer on this side.
    """

    def __init__(self, config: Config, *, in_process: bool, on_progress: Callable[[str], None]) -> None:
        self._config = config
        self._in_process = in_process
        self._on_progress = on_progress
        self._stop: Callable[[], None]
        self.run: Run
        self.vocab_size: int
        self.max_model_len: int

    def __enter__(self) -> OfflineEngine:
        if self._in_process:
            self._start_core()
        else:
            self._start_process()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start_core(self) -> None:
        from jaxserve.engine.core import EngineCore  # imports JAX

        core = EngineCore(self._config, on_progress=self._on_progress)
        self.run = lambda requests: run_in_core(core, requests)
        self.vocab_size, self.max_model_len = core.info.vocab_size, core.info.max_model_len
        self._stop = core.shutdown

    def _start_process(self) -> None:
        from jaxserve.engine.process_client import ProcessEngineClient

        runner = asyncio.Runner()

        async def start() -> ProcessEngineClient:
            client = ProcessEngineClient(self._config, on_progress=self._on_progress)
            await client.start()
            return client

        client = runner.run(start())
        self.run = lambda requests: runner.run(run_in_client(client, requests))
        self.vocab_size, self.max_model_len = client.model_info.vocab_size, client.model_info.max_model_len

        def stop() -> None:
            runner.run(client.shutdown())
            runner.close()

        self._stop = stop
