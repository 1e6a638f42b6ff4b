"""What a plan refuses, with which way out; and the command line."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys

import pytest

from jaxserve.cli.main import main
from jaxserve.config import config_from_values, load_config
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.plan import devices as devices_module
from jaxserve.plan import memory as memory_module
from jaxserve.plan.deployment import Deployment
from jaxserve.plan.devices import KINDS, Devices
from jaxserve.plan.memory import plan_or_suggest
from jaxserve.plan.roofline import rates
from jaxserve.plan.topologies import topology_mesh

LLAMA_8B = "configs/llama-3.1-8b-h100.yaml"
LLAMA_70B = "configs/llama-3.3-70b-h100x4.yaml"


def fits(path: str, devices: str, **values) -> None:
    plan_or_suggest(load_config(path).with_values(**values), Devices.parse(devices))


@pytest.mark.parametrize("module", [devices_module, memory_module], ids=lambda module: module.__name__)
def test_the_examples_hold(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


@pytest.mark.parametrize(
    ("path", "devices"),
    [
        (LLAMA_8B, "h100"),
        (LLAMA_70B, "h100:4"),
        ("configs/llama-3.3-70b-h100x8.yaml", "h100:8"),
        ("configs/llama-3.1-8b-v5e-4.yaml", "v5e:4"),
        ("configs/llama-3.1-8b-v6e-4.yaml", "v6e:4"),
    ],
)
def test_every_launch_file_fits_the_devices_it_is_named_for(path: str, devices: str):
    fits(path, devices)


@pytest.mark.parametrize(
    ("path", "devices", "values"),
    [
        (LLAMA_70B, "h100:1", {"tensor_parallel_size": 1}),
        (LLAMA_70B, "h100:2", {"tensor_parallel_size": 2}),
        (LLAMA_70B, "h100:8", {"tensor_parallel_size": 1}),
        ("configs/llama-3.1-8b-v5e-4.yaml", "v5e:1", {"tensor_parallel_size": 1}),
        (LLAMA_8B, "h100:8", {"max_model_len": 131072, "kv_cache_memory_bytes": 10 * 2**30}),
    ],
)
def test_what_does_not_fit_is_refused_with_settings_that_do(path: str, devices: str, values: dict):
    with pytest.raises(ConfigError, match="does not fit") as refusal:
        fits(path, devices, **values)
    _, _, ways = str(refusal.value).partition("these would fit: ")
    assert ways
    for way in ways.split(", or "):
        flags = dict(re.findall(r"--([\w-]+) (\S+)", way))
        given = flags.pop("devices", devices)
        changes = {name.replace("-", "_"): int(value) for name, value in flags.items()}
        if "max_num_batched_tokens" in changes:
            changes["max_num_seqs"] = min(changes["max_num_batched_tokens"], 128)
        fits(path, given, **(values | changes))


def test_rates_of_what_the_engine_would_not_run_are_refused():
    deployment, memory = plan_or_suggest(load_config(LLAMA_8B), Devices.parse("h100"))
    for batch_sizes, context, message in (
        ((1,), 32769, "--context is 32769, but max_model_len is 32768"),
        ((1, 257), 32, "--batch-size 257 with 32 tokens each cannot run at once: at most 256 can"),
        ((1, 30), None, "--batch-size 30 with 16384 tokens each cannot run at once: at most 26 can"),
    ):
        with pytest.raises(ConfigError, match=message):
            rates(deployment, memory, batch_sizes=batch_sizes, context=context)
    assert [rate.batch_size for rate in rates(deployment, memory, batch_sizes=(), context=None)] == [1, 26, 1]


def test_where_nothing_helps_the_refusal_says_so():
    with pytest.raises(ConfigError, match="nothing tried would fit"):
        fits(LLAMA_8B, "v5e:1", tensor_parallel_size=1, device="tpu", gpu_memory_utilization=0.05)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("h100:0", "from 1 on, such as h100:8, got 'h100:0'"),
        ("h100:-1", "got 'h100:-1'"),
        ("h1000:2", "did you mean h100?"),
        ("", "kinds: a100, h100, h200, v5e, v6e"),
    ],
)
def test_devices_that_there_are_not_are_refused(devices: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Devices.parse(devices)


@pytest.mark.parametrize(
    ("values", "devices", "message"),
    [
        ({"tensor_parallel_size": 16}, "h100:8", "take 16 devices, but --devices h100:8 has 8"),
        ({"tensor_parallel_size": 4, "data_parallel_size": 4}, "h100:8", "take 16 devices"),
        ({"tensor_parallel_size": 3}, "h100:8", "sizes that work: 1, 2, 4, 8, 16, 32"),
        ({"device": "tpu"}, "h100:8", "device is 'tpu', --devices h100:8 is a gpu"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(values: dict, devices: str, message: str):
    config = config_from_values({"model": "meta-llama/Llama-3.1-8B-Instruct"} | values)
    with pytest.raises(ConfigError, match=re.escape(message)):
        Deployment.of(config, Devices.parse(devices))


def test_a_gpu_before_hopper_is_planned_with_the_attention_that_serves_it(caplog):
    config = config_from_values({"model": "meta-llama/Llama-3.1-8B-Instruct"})
    chosen = {
        name: Deployment.of(config, Devices.parse(name)).graph.backend.implementation
        for name, kind in KINDS.items()
        if kind.platform == "gpu"
    }
    assert chosen == {"a100": "xla", "h100": "mosaic_gpu", "h200": "mosaic_gpu"}
    (warning,) = caplog.messages
    assert warning.startswith("attention runs on xla, because mosaic_gpu: ")
    assert warning.endswith("NVIDIA A100-SXM4-80GB has 8.0")
    with pytest.raises(ConfigError, match="attention_backend 'mosaic_gpu': mosaic_gpu runs on Hopper GPUs alone"):
        Deployment.of(config.with_values(attention_backend="mosaic_gpu"), Devices.parse("a100:2"))


def test_a_folder_s_config_json_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 1000,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "torch_dtype": "float16",
            }
        )
    )
    config = config_from_values({"model": str(tmp_path), "tensor_parallel_size": 4})
    deployment, memory = plan_or_suggest(config, Devices.parse("h100:4"))
    assert deployment.files.dtype.name == "float16"  # though this machine's CPU would run it in float32
    assert memory.weight_bytes == deployment.weight_bytes() > 0
    with pytest.raises(CheckpointError, match="has no config.json"):
        (tmp_path / "config.json").unlink()
        plan_or_suggest(config, Devices.parse("h100:4"))


def test_a_compiler_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="install jax-cuda13-plugin and jax-cuda13-pjrt .* without --compile"):
        topology_mesh("h100", tensor=4)
    with pytest.raises(ConfigError, match="not for h200:2"):
        topology_mesh("h200", tensor=2)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxserve", "plan", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_prints_json_for_programs():
    done = command("configs/llama-3.3-70b-h100x8.yaml", "--devices", "h100:8", "--json", "--batch-size", "1,64")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["collectives"] == {"forward": 161, "sampler": {"greedy": 1, "random": 5, "full": 10}}
    assert [rate["batch_size"] for rate in plan["roofline"]] == [1, 64, 1]
    assert plan["memory"]["weight_bytes"] == pytest.approx(2 * 70_553_706_496 / 8, rel=0.003)


def test_the_command_prints_a_table_for_people():
    done = command(LLAMA_8B, "--devices", "h100:2")
    assert done.returncode == 0, done.stderr
    for text in (
        "h100:2, 1 of them idle",
        "weights a device",
        "14.96 GiB",
        "requests at once",
        "13 of 32,768",
        "memory",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LLAMA_70B, "--devices", "h100:1", "--tensor-parallel-size", "1"], "these would fit: "),
        ([LLAMA_8B, "--devices", "h100", "--tensor-parallel-size", "0"], "tensor_parallel_size must be at least 1"),
        ([LLAMA_8B, "--devices", "h100", "--data-parallel-size", "-2"], "data_parallel_size must be at least 1"),
        ([LLAMA_8B, "--devices", "h100", "--batch-size", "0"], "--batch-size must be numbers from 1 on"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments: list[str], message: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxserve", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_every_kind_of_device_is_one_that_programs_run_on():
    assert {kind.platform for kind in KINDS.values()} == {"gpu", "tpu"}
    assert all(kind.name == name for name, kind in KINDS.items())
