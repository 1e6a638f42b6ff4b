"""`jaxserve serve` from start to end, with a fake engine core in a real engine process."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from jaxserve.bench.http_client import BenchClient
from jaxserve.bench.serving import Load, measure_server
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.cli.serve import bind, is_loopback, run_server
from jaxserve.config import config_from_values, load_config
from jaxserve.errors import ConfigError, TokenizerError

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from jaxserve.cli.serve import run_server
from jaxserve.config import load_config
run_server(load_config(sys.argv[1], environ={}), core="tests.engine.fake_core:FakeCore")
"""


@contextmanager
def process(model_dir: str, tmp_path: Path, **values):
    """A server process; yields it, its address, and its log file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = config_from_values({"model": model_dir, "served_model_name": "tiny", "port": port, **values})
    launch_file, log = tmp_path / "launch.yaml", tmp_path / "log"
    launch_file.write_text(config.model_dump_json())
    with open(log, "w") as log_file:
        server = subprocess.Popen([sys.executable, "-c", SERVE, str(launch_file)], cwd=ROOT, stderr=log_file)
        try:
            yield server, f"http://127.0.0.1:{port}", log
        finally:
            server.kill()
            server.wait()


def wait_for(condition, timeout_s: float = 30.0):
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return value


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", headers={"Authorization": "Bearer secret"}).status_code == 200
    except httpx.TransportError:
        return False


def children(server: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_cleanly_and_leaves_no_process(model_dir, tmp_path, number):
    with process(model_dir, tmp_path) as (server, url, log):
        wait_for(lambda: is_ready(url))
        engines = children(server)
        assert engines
        os.kill(server.pid, number)
        assert server.wait(20) == 0, log.read_text()
        assert psutil.wait_procs(engines, timeout=5)[1] == []
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_leaves_no_process(model_dir, tmp_path, number):
    with process(model_dir, tmp_path, hf_overrides={"start_s": 60}) as (server, _, log):
        wait_for(lambda: "loading the fake" in log.read_text())
        engines = children(server)
        os.kill(server.pid, number)
        code = server.wait(20)
        assert psutil.wait_procs(engines, timeout=5)[1] == []
    if number == signal.SIGTERM:  # what Ctrl-C raises is for the command to end
        assert (code, "Traceback" in log.read_text()) == (143, False), log.read_text()
    assert code != 0


@pytest.mark.parametrize(("template", "words"), [(None, "cannot read the chat template"), ("{% if %}", "in line 1")])
def test_a_chat_template_is_read_before_the_engine_starts(model_dir, tmp_path, monkeypatch, template, words):
    monkeypatch.setattr("jaxserve.cli.serve.set_up_logging", lambda level: None)
    path = tmp_path / "template.jinja"
    if template is not None:
        path.write_text(template)
    config = config_from_values({"model": model_dir, "port": 0, "chat_template": str(path)})
    with pytest.raises(TokenizerError, match=words) as raised:
        run_server(config, core="no.such:Core")
    assert str(path) in str(raised.value)


def test_a_broken_checkpoint_ends_the_start_with_its_message(model_dir, tmp_path):
    with process(model_dir, tmp_path, hf_overrides={"start": "checkpoint_error"}) as (server, _, log):
        assert server.wait(30) != 0
    assert "the fake checkpoint is broken" in log.read_text()


def test_the_log_tells_the_parts_of_the_start_and_the_address(model_dir, tmp_path):
    with process(model_dir, tmp_path) as (_, url, log):
        wait_for(lambda: is_ready(url))
        text = log.read_text()
    assert "loading the fake" in text
    assert "engine ready after" in text
    assert f"serving tiny at {url}/v1" in text


def test_bench_serve_counts_every_token_of_a_real_server(model_dir, tmp_path):
    workload = Workload(num_prompts=6, input_len=LengthRange(8, 16), output_len=LengthRange(5, 5), shared_prefix_len=4)
    with process(model_dir, tmp_path, api_key="secret") as (_, url, _log):
        wait_for(lambda: is_ready(url))
        report = measure_server(url, Load(workload, [1, 4], vocab_size=250), api_key="secret")
    assert [result["concurrency"] for result in report.results] == [1, 4]
    for result in report.results:
        assert (result["requests"], result["output_tokens"]) == (6, 30)
        assert 0 < result["ttft_ms_p50"] <= result["e2e_ms_p50"]


async def test_bench_serve_says_what_a_server_refused(model_dir, tmp_path):
    workload = Workload(num_prompts=1, input_len=LengthRange(8, 8), output_len=LengthRange(5000, 5000))
    with process(model_dir, tmp_path) as (_, url, _log):
        wait_for(lambda: is_ready(url))
        async with BenchClient(url) as client:
            with pytest.raises(ConfigError, match=r"refuses these requests \(HTTP 400\)"):
                await client.run(workload.requests(250), 1)


def test_a_port_in_use_is_known_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = load_config(None, {"model": "m", "port": taken.getsockname()[1]}, environ={}).server
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1:.*choose another with --host or --port"):
            bind(settings)


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_only_loopback_hosts_need_no_key(host, loopback):
    assert is_loopback(host) is loopback
