"""Starts that cannot succeed: one line says what is wrong, the exit code is 2, and there is no traceback.

One for each place that an error comes from; what else can be wrong there is tested where it is found: tests/weights,
tests/tokenizer, tests/core.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from jaxserve.weights.source import resolve_source
from tests.checkpoints import save_random_llama
from tests.e2e.server import MODEL, ROOT, SMALL_SHAPES, command, environment
from tests.e2e.tiny_model import TINY_SHAPES, write_tokenizer

TIMEOUT_S = 60
SOME_DEVICES = {"JAX_NUM_CPU_DEVICES": "8"}


def start(model: str | Path, *arguments: str, shapes: tuple[str, ...] = TINY_SHAPES) -> str:
    """Start a server that must fail; gives its last line of stderr."""
    done = subprocess.run(
        command("serve", str(model), *shapes, "--port", "0", *arguments),
        cwd=ROOT, env=environment() | SOME_DEVICES, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [line for line in lines if "error" in line.lower()] == lines[-1:], done.stderr
    return lines[-1].removeprefix("jaxserve: error: ")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole tiny model."""
    return write_tokenizer(save_random_llama(tmp_path / "model"))


def test_a_truncated_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    with open(resolve_source(MODEL).path, "rb") as whole:
        path.write_bytes(whole.read(3_000_000))
    message = start(path, shapes=SMALL_SHAPES)
    assert str(path) in message
    assert "truncated" in message or "ends" in message or "short" in message


def test_a_truncated_safetensors_file(checkpoint):
    path = checkpoint / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    message = start(checkpoint)
    assert "model.safetensors" in message


def test_a_missing_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    assert "holds no tokenizer: neither tokenizer.json nor" in start(checkpoint)


def test_a_config_with_a_typo(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_head"] = config.pop("num_attention_heads")
    path.write_text(json.dumps(config))
    assert "num_attention_heads" in start(checkpoint)


def test_a_config_that_does_not_fit_the_weights(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    message = start(checkpoint)
    assert "mlp" in message and "96" in message and "128" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "config.json: 'num_hidden_layers' must be at most 2048, got 1000000"),
        ({"quantization_config": {"quant_method": "awq"}}, "safetensors quantised by 'awq' are not supported"),
    ],
)
def test_a_config_of_no_model_that_can_be_served(checkpoint, change, message):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in start(checkpoint)


def test_a_model_that_is_not_there(tmp_path):
    assert "neither an existing path nor a hub id" in start(tmp_path / "nothing")


def test_a_port_in_use(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert start(checkpoint, "--port", str(port)).startswith(f"cannot listen on 127.0.0.1:{port}: ")


def test_a_mesh_that_does_not_fit_the_model(checkpoint):
    message = start(checkpoint, "--tensor-parallel-size", "3")
    words = ("tensor_parallel_size 3", "num_attention_heads (8)", "work: 1, 2, 4, 8")
    assert [word for word in words if word not in message] == [], message


def test_a_launch_file_with_a_typo(tmp_path):
    path = tmp_path / "launch.yaml"
    shutil.copy(ROOT / "configs" / "smollm2-135m.yaml", path)
    path.write_text(path.read_text().replace("max-num-seqs", "max-num-seq"))
    message = start(path, shapes=())
    assert message.endswith("unknown setting 'max-num-seq'; did you mean 'max_num_seqs'?")
    assert f"{path}:" in message
