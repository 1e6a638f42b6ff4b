"""Groups that cannot start: each host that is to blame says why in one line and ends with code 2; nobody waits long."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine.hosts.sockets import free_port
from tests.e2e.server import ROOT, command, environment, wait_for
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.hosts.group import flags
from tests.quick_compiles import QUICK_COMPILES

pytestmark = pytest.mark.multihost

TIME_LIMIT_S = 90  # of starting Python on a busy machine, above all
WAIT_S = 3
TWO = ("--tensor-parallel-size", "2")
THREE = ("--data-parallel-size", "3")


class Starts:
    """Commands that are ended with the test."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._model = model
        self.address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self._running: list[subprocess.Popen[str]] = []

    def host(self, num_hosts: int, rank: int, *arguments: str, address: str | None = None) -> subprocess.Popen[str]:
        """Start a host."""
        where = flags(address or self.address, num_hosts, rank)
        arguments = (str(self._model), *TINY_SHAPES, "--load-format", "dummy", "--port", "0", *where, *arguments)
        with open(self._folder / f"{len(self._running)}.log", "w") as log:
            process = subprocess.Popen(
                command("serve", *arguments),
                cwd=ROOT, env=environment() | QUICK_COMPILES, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                text=True,
            )  # fmt: skip
        self._running.append(process)
        return process

    def log(self, process: subprocess.Popen[str]) -> str:
        """What a host has written."""
        return (self._folder / f"{self._running.index(process)}.log").read_text()

    def error(self, process: subprocess.Popen[str]) -> str:
        """The one line with which a host must end."""
        code = process.wait(TIME_LIMIT_S)
        log = self.log(process)
        assert code == 2, log
        assert "Traceback" not in log
        (line,) = re.findall(r"^jaxserve: error: (.*)$", log, re.MULTILINE)
        return line

    def joined(self, leader: subprocess.Popen[str], rank: int) -> None:
        """Wait until the leader has a rank."""
        wait_for(lambda: f"node rank {rank} joined" in self.log(leader), TIME_LIMIT_S, self.log(leader))

    def kill(self) -> None:
        """End what still runs."""
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    made = Starts(tmp_path, write_config(tmp_path / "model"))
    yield made
    made.kill()


def test_a_leader_that_is_not_there(starts):
    begin_s = time.monotonic()
    message = starts.error(starts.host(2, 1, *TWO, "--dist-timeout-s", str(WAIT_S)))
    assert message.startswith(f"no leader answers at dist_init_addr {starts.address} after {WAIT_S} s")
    assert time.monotonic() - begin_s < TIME_LIMIT_S


def test_a_host_that_does_not_come(starts):
    message = starts.error(starts.host(2, 0, *TWO, "--dist-timeout-s", str(WAIT_S)))
    assert message.startswith(f"1 of 2 hosts are there after {WAIT_S} s; missing: node rank 1")
    assert starts.address in message


def test_a_rank_given_twice_and_a_host_with_other_settings(starts):
    leader = starts.host(3, 0, *THREE)
    first = starts.host(3, 1, *THREE)
    starts.joined(leader, 1)
    twin = starts.host(3, 1, *THREE)
    other = starts.host(3, 2, *THREE, "--max-num-seqs", "4")
    assert "another host is node rank 1 already; give each host a --node-rank of its own" in starts.error(twin)
    assert "max_num_seqs is 4 here, but 2 on node rank 0; all hosts must be given the same" in starts.error(other)
    assert leader.poll() is None and first.poll() is None


def test_another_checkpoint_under_the_same_name(starts, tmp_path):
    leader = starts.host(2, 0, *TWO)
    path = tmp_path / "model" / "config.json"
    wait_for(lambda: "waiting at" in starts.log(leader), TIME_LIMIT_S, "the leader")
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    follower = starts.host(2, 1, *TWO)
    assert "checkpoint is" in starts.error(follower)
    assert "a host that asked to be node rank 1 was refused: checkpoint is" in starts.log(leader)
    assert leader.poll() is None


def test_more_devices_asked_than_there_are(starts):
    leader, follower = (starts.host(2, rank, "--tensor-parallel-size", "32") for rank in (0, 1))
    for process in (leader, follower):
        message = starts.error(process)
        assert re.search(
            r"tensor_parallel_size is 32, which is 16 a host, but cpu on node rank 0 has \d+ device", message
        )


@pytest.mark.parametrize(
    ("address", "words"),
    [("192.0.2.1:5000", "rank 0 cannot listen at dist_init_addr 192.0.2.1:5000"), ("nowhere.invalid:5000", "resolved")],
)
def test_an_address_that_is_not_this_hosts(starts, address, words):
    assert words in starts.error(starts.host(2, 0, *TWO, address=address))
