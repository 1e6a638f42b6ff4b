"""Deployments that cannot be: each ends with exit code 2 and one line of what is wrong and what would be right."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from jaxserve.errors import ConfigError
from tests.e2e.server import ROOT, command, environment


def fails(*arguments: str, run: list[str] | None = None) -> str:
    """The one line on standard error of a `jaxserve deploy` that exits with 2."""
    done = subprocess.run(
        run or command("deploy", *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("jaxserve: error: ")]
    assert (done.returncode, len(ours)) == (2, 1), done.stderr
    assert done.stderr.splitlines()[-1] == ours[0], "nothing comes after it"
    assert "Traceback" not in done.stderr
    return ours[0]


def test_without_ray_the_line_says_what_to_install(launch_file):
    code = "import sys; sys.modules['ray'] = None; from jaxserve.cli.main import main; main()"
    line = fails(run=[sys.executable, "-c", code, "deploy", str(launch_file)])
    assert "pip install 'jaxserve[ray]'" in line


def test_a_port_in_use_is_named(launch_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in fails(str(launch_file), "--port", str(port))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-replicas", "0"), "num_replicas must be at least 1, got 0"),
        (("--max-replicas", "2"), "num_replicas (3) and max_replicas (2) must not fall"),
        (("--min-replicas", "2"), "needs max_replicas"),
        (
            ("--nnodes", "2", "--tensor-parallel-size", "2", "--dist-init-addr", "10.0.0.1:5000"),
            "nnodes is 2, but each engine of a deployment runs on one host",
        ),
        (("--max-ongoing-requests", "1000"), "max_ongoing_requests must be at most 900, got 1000"),
        (("--replica-resources", '{"CPU": 0}'), "replica_resources must be greater than 0"),
        (("--device", "auto"), "set device to cpu, cuda or tpu"),
        (("--ray-address", "127.0.0.1:1"), "no Ray cluster answers at ray_address '127.0.0.1:1'"),
        (("--ray-address", "ray://here"), "must be host:port or auto"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_started(launch_file, flags, said):
    assert said in fails(str(launch_file), *flags)


def test_a_serve_config_file_is_refused_for_the_same_reasons(launch_file):
    pytest.importorskip("ray.serve", exc_type=ImportError)
    from jaxserve.deploy.application import build

    args = {"config": str(launch_file), "nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    with pytest.raises(ConfigError, match="nnodes is 2, but each engine of a deployment runs on one host"):
        build(args)


def test_more_replicas_than_the_cluster_has_room_for(launch_file, ray_cluster):
    flags = ("--ray-address", ray_cluster.address, "--port", "0", "--num-replicas", "9")
    line = fails(str(launch_file), *flags)
    assert "9 replicas of 1 CPU each do not fit: 3 do" in line


def test_a_config_that_no_engine_starts_with(launch_file, ray_cluster):
    flags = ("--ray-address", ray_cluster.address, "--port", "0", "--num-replicas", "1", "--max-model-len", "4096")
    assert "max_model_len is 4096, but the model's max_position_embeddings is 256" in fails(str(launch_file), *flags)


def test_serve_takes_no_flags_of_several_engines(launch_file):
    done = subprocess.run(
        command("serve", str(launch_file), "--num-replicas", "2"), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "only 'jaxserve deploy' runs several engines" in done.stderr
