"""`ServerProcess`: the `jaxserve` command as a user starts it, in a process of its own, on a port the system chose."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from tests.checkpoints import SMOLLM2

ROOT = Path(__file__).parents[2]
MODEL = SMOLLM2
NAME = "SmolLM2-135M-Instruct"
MAX_MODEL_LEN = 512
SMALL_SHAPES = (
    *("--dtype", "float32", "--device", "cpu", "--token-buckets", "8,64", "--max-num-batched-tokens", "64"),
    *("--max-num-seqs", "8", "--max-model-len", str(MAX_MODEL_LEN), "--num-gpu-blocks-override", "129"),
)
START_TIMEOUT_S = 300.0  # a first start compiles
_SERVING = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)/v1")

Value = TypeVar("Value")


def command(*arguments: str) -> list[str]:
    """The command line of `jaxserve` with these arguments."""
    return [sys.executable, "-m", "jaxserve.cli.main", *arguments]


def environment() -> dict[str, str]:
    """This process's environment without what would change a server behind a test's back."""
    return {name: value for name, value in os.environ.items() if name not in ("JAXSERVE_API_KEY", "OMP_NUM_THREADS")}


def wait_for(condition: Callable[[], Value], timeout_s: float, what: str = "") -> Value:
    """Call `condition` until it gives something true; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.02)
    return value


class ServerProcess:
    """A running server; `url` is known once it serves. Use `with`: its end kills what is left."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        subcommand: str = "serve",
        env: Mapping[str, str] | None = None,
        run: list[str] | None = None,
    ) -> None:
        """`run`: a command line of its own, for all of the above but `env`."""
        self.log = log
        self.url = ""
        with open(log, "w") as log_file:
            self.process = subprocess.Popen(
                run or command(subcommand, *arguments, "--port", "0"),
                cwd=ROOT,
                env=environment() | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )
        self._known: list[psutil.Process] = []

    def __enter__(self) -> ServerProcess:
        try:
            self.url = wait_for(self._serving_url, START_TIMEOUT_S, "the server's start")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _serving_url(self) -> str:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log.read_text()}"
        found = _SERVING.search(self.log.read_text())
        return found[1] if found else ""

    def engine(self) -> psutil.Process:
        """The engine process: the child that holds the model."""
        children = self.descendants()
        assert children, self.log.read_text()
        return max(children, key=lambda process: process.memory_info().rss)

    def descendants(self) -> list[psutil.Process]:
        """All processes below the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the server and its children without asking, if they still run."""
        left = self.descendants() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for child in left:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=10)

    def metric(self, name: str) -> float:
        """The value of a metric without labels of its own, such as `num_requests_running`."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^jaxserve:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return float(found[1])
