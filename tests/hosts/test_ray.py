"""Ray places the followers: a real cluster of two nodes on this machine, and the group that it runs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.e2e.server import ROOT, ServerProcess, command, environment, wait_for
from tests.e2e.tiny_model import TINY_SHAPES, write_config
from tests.hosts.group import QUICK_COMPILES
from tests.hosts.test_bad_starts import TIME_LIMIT_S

pytestmark = pytest.mark.multihost

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves this machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # and nothing its loopback: Ray takes this for "no other machines"
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each."""
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        running.add_node(**NODE)
        yield running.address
    finally:
        running.shutdown()
        patch.undo()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("ray") / "model")


def by_ray(model: Path, num_hosts: int, folder: Path) -> tuple[str, ...]:
    return (
        *(str(model), *TINY_SHAPES, "--load-format", "dummy", "--tensor-parallel-size", str(num_hosts)),
        *("--nnodes", str(num_hosts), "--distributed-executor-backend", "ray", "--dist-timeout-s", "60"),
        *("--compilation-cache-dir", str(folder)),
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
    import ray
    from ray.util import placement_group_table

    variables = ENVIRONMENT | QUICK_COMPILES | {"RAY_ADDRESS": cluster}
    with ServerProcess(tmp_path / "log", *by_ray(tiny, 2, tmp_path / "compiled"), env=variables) as server:
        answer = completion(server)
        ray.init(address=cluster, log_to_driver=False, logging_level="error")
        (group,) = [table for table in placement_group_table().values() if table["state"] == "CREATED"]
        ray.shutdown()
        assert group["strategy"] == "STRICT_SPREAD"
        assert len(set(group["bundles_to_node_id"].values())) == 2

        ray_follower().kill()
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, 10, "the leader's notice")
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 120, server.log.read_text())
        assert completion(server) == answer

        server.terminate()
        assert server.process.wait(30) == 0, server.log.read_text()
    assert [process for process in psutil.process_iter() if is_follower(process)] == []


def test_a_cluster_with_too_few_hosts(cluster, tiny, tmp_path):
    flags = (*by_ray(tiny, 3, tmp_path), "--dist-timeout-s", "3", "--port", "0")
    message = failing(flags, ENVIRONMENT | {"RAY_ADDRESS": cluster})
    assert message.startswith(
        "nnodes is 3, each with 1 CPU, this host among them, but Ray could not reserve them in 3 s"
    )
    assert message.endswith("2 of its 2 hosts have that")


def test_a_model_that_another_host_does_not_have(cluster, tmp_path):
    """The follower's error is the leader's."""
    flags = (*by_ray(Path("nowhere"), 2, tmp_path), "--port", "0")
    assert "neither an existing path nor a hub id" in failing(flags, ENVIRONMENT | {"RAY_ADDRESS": cluster})


def test_no_cluster(tiny, tmp_path):
    flags = (*by_ray(tiny, 2, tmp_path), "--port", "0")
    message = failing(flags, ENVIRONMENT | {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)})
    assert message.startswith("no Ray cluster to run on: ")


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
