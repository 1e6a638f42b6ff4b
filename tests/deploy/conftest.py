"""One Ray cluster of several nodes for all tests of this folder, and the deployment that most of them talk to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.deploy.ray_cluster import SETTINGS
from tests.e2e.server import ROOT, ServerProcess
from tests.e2e.tiny_model import write_config
from tests.quick_compiles import QUICK_COMPILES

NUM_REPLICAS = 3
BLOCK_SIZE, MAX_MODEL_LEN = 16, 256
SETTINGS_OF_ENGINE = {
    "dtype": "float32",
    "load_format": "dummy",
    "device": "cpu",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "token_buckets": (64,),
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 257,
}


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A running cluster."""

    address: str
    pid: int

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes that Ray gave a name with these words."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found


@pytest.fixture(scope="package")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head without CPUs, and a node with one for each engine, so that no engine is on the head."""
    pytest.importorskip("ray.serve", reason="needs the extra 'ray'", exc_type=ImportError)
    log = tmp_path_factory.mktemp("ray") / "log"
    with open(log, "w") as log_file, pytest.MonkeyPatch.context() as patch:
        for name, value in (SETTINGS | QUICK_COMPILES).items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.ray_cluster", str(NUM_REPLICAS)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )
        assert process.stdout is not None and process.stdin is not None
        left = []
        try:
            address = ""
            for line in process.stdout:
                if line.startswith("address "):
                    address = line.split()[1]
                    break
            assert address, log.read_text()
            yield RayCluster(address, process.pid)
            left = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stdin.close()
            _, alive = psutil.wait_procs(left, timeout=10)
            for child in alive:
                child.kill()


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; its weights are made up."""
    return write_config(tmp_path_factory.mktemp("deploy") / "tiny")


@pytest.fixture(scope="package")
def launch_file(tiny_model: Path) -> Path:
    """A launch file of three replicas."""
    flat = {**SETTINGS_OF_ENGINE, "model": str(tiny_model), "served_model_name": "tiny", "num_replicas": NUM_REPLICAS}
    path = tiny_model.parent / "launch.yaml"
    path.write_text("".join(f"{name}: {list(v) if isinstance(v, tuple) else v}\n" for name, v in flat.items()))
    return path


@pytest.fixture(scope="package")
def deployment(
    ray_cluster: RayCluster, launch_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """`jaxserve deploy` with three replicas."""
    log = tmp_path_factory.mktemp("deployment") / "log"
    flags = ("--ray-address", ray_cluster.address, "--health-check-period-s", "1", "--max-load-difference", "8")
    with ServerProcess(log, str(launch_file), *flags, subcommand="deploy") as running:
        yield running
