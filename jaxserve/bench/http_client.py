"""The load of `bench serve`: streaming completions of a running server, a fixed number at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from jaxserve.bench.statistics import RequestTimes
from jaxserve.bench.workload import BenchRequest
from jaxserve.errors import ConfigError, JaxserveError

_DATA = "data: "
_DONE = "[DONE]"


class BenchClient:
    """A client of one OpenAI-compatible server. `url` ends before `/v1`; an async context manager."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A connection a request: servers close idle ones as they please, which would end a run.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        base_url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, limits=limits, timeout=None)
        self._model = model

    async def __aenter__(self) -> BenchClient:
        try:
            if self._model is None:
                reply = await self._http.get("/v1/models")
                _check(reply.status_code, reply.text)
                self._model = reply.json()["data"][0]["id"]
        except httpx.TransportError as error:
            await self._http.aclose()
            raise JaxserveError(
                f"no server answers at {self._http.base_url} ({error or type(error).__name__})"
            ) from error
        except BaseException:
            await self._http.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self, requests: Sequence[BenchRequest], concurrency: int) -> tuple[list[RequestTimes], float]:
        """Run the requests, `concurrency` at a time; returns their times and the seconds it took."""
        waiting = iter(requests)
        times: list[RequestTimes] = []

        async def work() -> None:
            for request in waiting:  # shared: each worker takes the next one
                times.append(await self._run_one(request))

        begin_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(requests))):
                    group.create_task(work())
        except* httpx.TransportError as errors:
            first = errors.exceptions[0]
            raise JaxserveError(f"the server broke the connection: {first or type(first).__name__}") from first
        except* JaxserveError as errors:
            raise errors.exceptions[0] from None
        return times, time.perf_counter() - begin_s

    async def _run_one(self, request: BenchRequest) -> RequestTimes:
        body = {
            "model": self._model,
            "prompt": request.prompt_token_ids,
            "max_tokens": request.output_len,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times = RequestTimes(sent_s=time.perf_counter(), num_prompt_tokens=len(request.prompt_token_ids))
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                _check(reply.status_code, (await reply.aread()).decode("utf-8", "replace"))
            async for line in reply.aiter_lines():
                _take_line(line, times)
        if times.num_output_tokens != request.output_len:
            raise JaxserveError(f"asked for {request.output_len} tokens, the server sent {times.num_output_tokens}")
        return times


def _take_line(line: str, times: RequestTimes) -> None:
    """Take in a line of the event stream: a chunk with text is an arrival, the last one counts the tokens."""
    if not line.startswith(_DATA) or line == _DATA + _DONE:
        return
    now_s = time.perf_counter()
    chunk: dict[str, Any] = json.loads(line.removeprefix(_DATA))
    if "error" in chunk:
        raise JaxserveError(f"the server sent an error: {chunk['error']}")
    if chunk.get("choices"):
        times.arrivals_s.append(now_s)
    if chunk.get("usage"):
        times.num_output_tokens = chunk["usage"]["completion_tokens"]


def _check(status: int, text: str) -> None:
    if status == httpx.codes.BAD_REQUEST:  # what is asked for is the command line's
        raise ConfigError(f"the server refuses these requests (HTTP {status}): {text[:500]}")
    if status != httpx.codes.OK:
        raise JaxserveError(f"the server answered with HTTP {status}: {text[:500]}")
