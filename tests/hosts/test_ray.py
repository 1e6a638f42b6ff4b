"""Ray places the followers: a real cluster of two nodes on this machine, and the group that it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.e2e.server import ROOT, ServerProcess, command, environment, wait_for
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.hosts.ray_cluster import ENVIRONMENT
from tests.hosts.test_bad_starts import TIME_LIMIT_S
from tests.quick_compiles import QUICK_COMPILES

pytestmark = pytest.mark.multihost


@dataclass(frozen=True, slots=True)
class Cluster:
    process: subprocess.Popen[str]
    address: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a command that is to run on it."""
        return ENVIRONMENT | QUICK_COMPILES | {"RAY_ADDRESS": self.address}

    def placement_groups(self) -> list[dict[str, Any]]:
        """Those that Ray has made."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("groups\n")
        self.process.stdin.flush()
        return [group for group in json.loads(self.process.stdout.readline()) if group["state"] == "CREATED"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with a CPU each. Not in this process: Ray forks, and JAX is in here."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hosts.ray_cluster"],
        cwd=ROOT, env=environment() | QUICK_COMPILES, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Cluster(process, process.stdout.readline().strip())
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("ray") / "model")


def by_ray(model: Path, num_hosts: int) -> tuple[str, ...]:
    return (
        *(str(model), *TINY_SHAPES, "--load-format", "dummy", "--tensor-parallel-size", str(num_hosts)),
        *("--nnodes", str(num_hosts), "--distributed-executor-backend", "ray", "--dist-timeout-s", "60"),
    )


def completion(server: ServerProcess) -> str:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as api:
        (model,) = api.models.list().data
        answer = api.completions.create(
            model=model.id, prompt="abc", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
    return answer.choices[0].text


def ray_follower() -> psutil.Process:
    """The actor's process, as Ray names it."""
    (found,) = [process for process in psutil.process_iter() if is_follower(process)]
    return found


def is_follower(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::RayFollower")
    except (psutil.Error, IndexError):
        return False


def test_ray_places_a_worker_on_each_host_and_brings_it_back(cluster, tiny, tmp_path):
    with ServerProcess(tmp_path / "log", *by_ray(tiny, 2), env=cluster.variables) as server:
        answer = completion(server)
        (group,) = cluster.placement_groups()
        assert group["strategy"] == "STRICT_SPREAD"
        assert len(set(group["bundles_to_node_id"].values())) == 2

        ray_follower().kill()
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10, "the leader's notice")
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 120, server.log.read_text())
        assert completion(server) == answer

        server.terminate()
        assert server.process.wait(30) == 0, server.log.read_text()
    wait_for(lambda: not any(map(is_follower, psutil.process_iter())), 20, "the follower's end")
    assert cluster.placement_groups() == []


def test_a_cluster_with_too_few_hosts(cluster, tiny):
    flags = (*by_ray(tiny, 3), "--dist-timeout-s", "3", "--port", "0")
    message = failing(flags, cluster.variables)
    assert message.startswith(
        "nnodes is 3, each with 1 CPU, this host among them, but Ray could not reserve them in 3 s"
    )
    assert message.endswith("2 of its 2 hosts have that")


def test_a_model_that_another_host_does_not_have(cluster):
    """The follower's error is the leader's."""
    flags = (*by_ray(Path("nowhere"), 2), "--port", "0")
    assert "neither an existing path nor a hub id" in failing(flags, cluster.variables)


def test_no_cluster(tiny):
    flags = (*by_ray(tiny, 2), "--port", "0")
    message = failing(flags, ENVIRONMENT | {"RAY_ADDRESS": "127.0.0.1:1"})
    assert message.startswith("no Ray cluster to run on: nobody answers at 127.0.0.1:1")


def failing(flags: tuple[str, ...], variables: dict[str, str]) -> str:
    """The one line of a server that cannot start."""
    done = subprocess.run(
        command("serve", *flags), cwd=ROOT, env=environment() | variables,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIME_LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = re.findall(r"^jaxserve: error: (.*)$", done.stderr, re.MULTILINE)
    return line
