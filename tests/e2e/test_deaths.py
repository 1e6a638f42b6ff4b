"""Processes that die, on servers with random weights: nothing stays behind, and nobody waits for an answer in vain."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import ServerProcess, wait_for
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.quick_compiles import QUICK_COMPILES

LONG: dict[str, Any] = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "n": 128}  # many rounds of two


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("deaths") / "tiny")


@contextmanager
def serving(model: Path, log: Path, *flags: str) -> Iterator[ServerProcess]:
    with ServerProcess(log, str(model), *TINY_SHAPES, "--load-format", "dummy", *flags, env=QUICK_COMPILES) as running:
        yield running


def test_an_engine_ends_when_its_server_is_killed(tiny, tmp_path):
    with serving(tiny, tmp_path / "log") as server:
        processes = server.descendants()
        assert processes
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_a_second_signal_ends_a_busy_server_at_once(tiny, tmp_path):
    with serving(tiny, tmp_path / "log") as server, ThreadPoolExecutor() as threads:
        processes = server.descendants()
        answer = threads.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
        wait_for(lambda: server.metric("num_requests_running") > 0, 20, "the request's start")
        server.terminate()
        wait_for(lambda: "shutting down" in server.log.read_text(), 5, "the first signal")
        server.terminate()
        server.process.wait(10)
        assert psutil.wait_procs(processes, timeout=5)[1] == []
        reply = answer.result(10)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")


def test_requests_still_running_after_the_shutdown_timeout_are_aborted(tiny, tmp_path):
    flags = ("--shutdown-timeout-s", "0.5")
    with serving(tiny, tmp_path / "log", *flags) as server, ThreadPoolExecutor() as threads:
        answer = threads.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
        wait_for(lambda: server.metric("num_requests_running") > 0, 20, "the request's start")
        server.terminate()
        assert server.process.wait(15) == 0
        assert (answer.result(10).status_code, answer.result().json()["error"]["type"]) == (503, "server_error")


def test_an_engine_that_may_not_be_restarted_leaves_a_server_that_says_so(tiny, tmp_path):
    with serving(tiny, tmp_path / "log", "--max-num-engine-restarts", "0") as server:
        server.engine().kill()
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10, "the server's notice")
        assert httpx.get(f"{server.url}/health").json() == {"status": "dead"}
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "dead")
        assert "killed" in ready.json()["detail"].lower() or "SIGKILL" in ready.json()["detail"]
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_not_ready")
        server.terminate()
        server.process.wait(10)
