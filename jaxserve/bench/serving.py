"""`bench serve`: what users of a server see, at several numbers of requests at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from jaxserve.bench.http_client import BenchClient
from jaxserve.bench.report import Report
from jaxserve.bench.statistics import summarize
from jaxserve.bench.workload import Workload
from jaxserve.config import Config
from jaxserve.errors import ConfigError, JaxserveError

ALL_AT_ONCE = "all"
START_TIMEOUT_S = 1800.0  # a large model over a slow disk
STOP_TIMEOUT_S = 60.0
POLL_S = 0.25
WARM_UP_REQUESTS = 2


def parse_concurrencies(text: str, num_prompts: int) -> list[int]:
    """Read "1,4,16,all".

    >>> parse_concurrencies("1,4,all", 100)
    [1, 4, 100]
    """
    try:
        sizes = [num_prompts if part.strip() == ALL_AT_ONCE else int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--concurrency must be numbers such as 1,4,16 or 'all', got {text!r}")
    return sizes


@dataclass(frozen=True, slots=True)
class Load:
    """What a server is asked: the workload, once at each number of requests at a time."""

    workload: Workload
    concurrencies: Sequence[int]
    vocab_size: int  # prompts are random ids below this


def measure_server(url: str, load: Load, *, api_key: str | None) -> Report:
    """Measure a server that runs already."""
    results = asyncio.run(_measure(url, load, api_key))
    settings = {"url": url, "workload": load.workload.describe()}
    return Report(benchmark="serving", settings=settings, results=results)


def measure_started_server(config: Config, load: Load) -> Report:
    """Start a server, measure it, and stop it."""
    with started_server(config) as url:
        results = asyncio.run(_measure(url, load, next(iter(config.server.api_key), None)))
    settings = {"config": config.redacted(), "workload": load.workload.describe()}
    return Report(benchmark="serving", settings=settings, results=results)


async def _measure(url: str, load: Load, api_key: str | None) -> list[dict[str, float]]:
    """Run the workload at each concurrency, with prompts that no earlier run has left in the prefix cache."""
    results = []
    async with BenchClient(url, api_key=api_key) as client:
        warm_up = replace(load.workload, num_prompts=WARM_UP_REQUESTS, seed=-1)
        await client.run(warm_up.requests(load.vocab_size), WARM_UP_REQUESTS)
        for round_number, concurrency in enumerate(load.concurrencies):
            seed = hash((load.workload.seed, round_number))  # of integers: the same in every process
            requests = replace(load.workload, seed=seed).requests(load.vocab_size)
            times, duration_s = await client.run(requests, concurrency)
            results.append({"concurrency": concurrency} | summarize(times, duration_s))
    return results


@contextmanager
def started_server(config: Config) -> Iterator[str]:
    """Start `jaxserve serve` on a free port of this machine, wait until it is ready, and stop it after use."""
    port = _free_port()
    config = config.with_values(host="127.0.0.1", port=port)
    with tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as folder:  # nobody else may enter: it holds API keys
        launch_file = Path(folder) / "launch.yaml"
        launch_file.write_text(config.model_dump_json(), encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-m", "jaxserve.cli.main", "serve", os.fspath(launch_file)])
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, config.server.api_key)
            yield url
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, api_keys: Sequence[str]) -> None:
    headers = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise JaxserveError(f"the server ended with exit code {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/ready", headers=headers, timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(POLL_S)
    raise JaxserveError(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
