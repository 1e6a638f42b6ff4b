"""`Group`: several hosts as a user starts them, one `jaxserve serve` each, all of them on this machine's loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil

from jaxserve.engine.hosts.sockets import free_port
from tests.e2e.server import ROOT, ServerProcess, command, environment
from tests.e2e.tiny_model import TINY_SHAPES
from tests.quick_compiles import QUICK_COMPILES


def flags(address: str, num_hosts: int, rank: int) -> tuple[str, ...]:
    return ("--nnodes", str(num_hosts), "--node-rank", str(rank), "--dist-init-addr", address)


class Follower:
    """The command of a rank above 0."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with open(log, "w") as log_file:
            self.process = subprocess.Popen(
                command("serve", *arguments),
                cwd=ROOT, env=environment() | QUICK_COMPILES, stdin=subprocess.DEVNULL,
                stdout=log_file, stderr=log_file,
            )  # fmt: skip

    def engine(self) -> psutil.Process:
        """Its engine process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def kill(self) -> None:
        """End it and its engine process without asking, if they still run."""
        left = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(left, timeout=10)  # they die with it


class Group:
    """A leader that serves HTTP, and its followers. Use `with`: its end kills what is left."""

    def __init__(self, folder: Path, model: Path, num_hosts: int, *arguments: str) -> None:
        self._folder = folder
        self._arguments = (*(str(model), *TINY_SHAPES, *arguments, "--max-num-engine-restarts", "9"),)
        self._num_hosts = num_hosts
        self._address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self._num_logs = 0
        self.followers = {rank: self.start_follower(rank) for rank in range(1, num_hosts)}
        self.leader = ServerProcess(
            folder / "leader.log", *self._arguments, *flags(self._address, num_hosts, 0), env=QUICK_COMPILES
        )

    def __enter__(self) -> Group:
        try:
            self.leader.__enter__()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start_follower(self, rank: int) -> Follower:
        """Start a rank's command, for the first time or again."""
        self._num_logs += 1
        log = self._folder / f"rank-{rank}-{self._num_logs}.log"
        return Follower(log, *self._arguments, *flags(self._address, self._num_hosts, rank))

    def kill(self) -> None:
        """End all without asking."""
        for follower in self.followers.values():
            follower.kill()
        self.leader.kill()

    def logs(self) -> str:
        """What all wrote."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self._folder.glob("*.log")))
