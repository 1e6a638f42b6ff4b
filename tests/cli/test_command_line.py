"""The command line as a user meets it: flags from the config, errors in a line, and a quick `--help`."""

import json
import subprocess
import sys

import pytest
import yaml

from jaxserve.cli.main import main
from jaxserve.config import FIELDS, load_config
from jaxserve.errors import PromptTooLongError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def command_line(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["jaxserve", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return command_line


@pytest.fixture
def resolved(run):
    """The config that arguments make, as flat values."""

    def values(*arguments: str) -> dict:
        code, out, err = run("config", *arguments)
        assert code == 0, err
        return {name: value for section in yaml.safe_load(out).values() for name, value in section.items()}

    return values


def test_every_setting_is_a_flag_of_serve(run):
    _, out, _ = run("serve", "--help")
    missing = [name for name in FIELDS if f"--{name.replace('_', '-')}" not in out]
    assert missing == []


def test_flags_of_every_type_reach_the_config(resolved):
    values = resolved(
        "m", "--tensor-parallel-size", "4", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes", "2GiB", "--served-model-name", "a", "--served-model-name", "b",
        "--token-buckets", "16,32", "--hf-overrides", '{"num_hidden_layers": 2}', "--dtype", "float32",
    )  # fmt: skip
    expected = {
        "model": "m",
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2 * 1024**3,
        "served_model_name": ["a", "b"],
        "token_buckets": [16, 32],
        "hf_overrides": {"num_hidden_layers": 2},
        "dtype": "float32",
    }
    assert expected.items() <= values.items()


def test_command_lines_made_for_vllm_are_read_alike(resolved):
    values = resolved(
        "m", "--served-model-name", "a", "b", "-tp", "2", "--max-model-len", "4k", "--max-num-batched-tokens", "8K",
        "--enable-chunked-prefill", "--api-key", "x", "y",
    )  # fmt: skip
    expected = {
        "served_model_name": ["a", "b"],
        "tensor_parallel_size": 2,
        "max_model_len": 4000,
        "max_num_batched_tokens": 8192,
        "enable_chunked_prefill": True,
        "api_key": ["***", "***"],
    }
    assert expected.items() <= values.items()
    assert resolved("--served-model-name", "a", "m")["served_model_name"] == ["a"]  # m is the model


def test_without_flags_the_defaults_hold(resolved):
    defaults = load_config(None, {"model": "m"}, environ={}).model_dump(mode="json")
    assert resolved("m") == {name: value for section in defaults.values() for name, value in section.items()}


def test_a_launch_file_is_told_from_a_model_by_its_name(resolved, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text("model: from-file\nport: 80\n")
    by_name, by_flag = resolved(str(path), "--port", "90"), resolved("--config", str(path), "--port", "90")
    assert by_name == by_flag
    assert (by_name["model"], by_name["port"]) == ("from-file", 90)
    assert resolved("other-model", "--config", str(path))["model"] == "other-model"


def test_what_config_prints_is_a_launch_file_again(run, resolved, tmp_path):
    _, out, _ = run("config", "m", "--port", "90", "--token-buckets", "16,32")
    path = tmp_path / "again.yaml"
    path.write_text(out)
    assert resolved(str(path)) == resolved("m", "--port", "90", "--token-buckets", "16,32")


def test_config_hides_api_keys(run):
    _, out, err = run("config", "m", "--api-key", "hunter2")
    assert "hunter2" not in out + err


def test_config_prints_the_schema_without_a_model(run):
    code, out, _ = run("config", "--schema")
    assert code == 0
    assert "ServerSettings" in json.loads(out)["$defs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--port", "99999"], "jaxserve: error: port must be at most 65535, got 99999 (an integer)\n"),
        (
            ["m", "--device", "gpu"],
            "jaxserve: error: device must be 'auto', 'cpu', 'cuda' or 'tpu', got 'gpu' (text)\n",
        ),
        (["no.yaml"], "jaxserve: error: cannot read launch file 'no.yaml': No such file or directory\n"),
        ([], "jaxserve: error: model is missing: give it in the launch file or as a flag\n"),
        (["m", "--model", "n"], "jaxserve: error: two models given: 'm' and --model 'n'\n"),
        (["a.yaml", "--config", "b.yaml"], "jaxserve: error: two launch files given: 'a.yaml' and --config 'b.yaml'\n"),
    ],
)
def test_a_wrong_setting_ends_with_one_line_and_code_2(run, arguments, message):
    assert run("config", *arguments) == (2, "", message)


def test_an_unknown_flag_names_the_nearest(run):
    code, _, err = run("config", "m", "--max-num-seq", "3")
    assert code == 2
    assert "--max-num-seqs" in err


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_client_without_a_server_says_how_to_start_one(run, command):
    code, _, err = run(command, "--url", "http://127.0.0.1:1/v1", "-q", "hi")
    assert code == 1
    assert err.startswith("jaxserve: error: no server answers at http://127.0.0.1:1/v1")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a model or a launch file to start a server with, or --url of one that runs"),
        (["m", "--url", "http://127.0.0.1:1"], "give either a model or a launch file"),
        (
            ["--url", "http://127.0.0.1:1", "--concurrency", "0"],
            "--concurrency must be numbers such as 1,4,16 or 'all'",
        ),
        (["--url", "http://127.0.0.1:1", "--input-len", "9:3"], "--input-len must be a number of tokens such as 128"),
        (["--url", "http://127.0.0.1:1", "--shared-prefix-len", "128"], "--shared-prefix-len (128) must be less than"),
    ],
)
def test_bench_serve_refuses_what_it_cannot_run(run, arguments, message):
    code, _, err = run("bench", "serve", *arguments)
    assert (code, err.removeprefix("jaxserve: error: ").startswith(message)) == (2, True), err


@pytest.mark.parametrize("command", ["throughput", "latency", "serve", "speculative", "step"])
@pytest.mark.parametrize(("name", "reason"), [("no/x.json", "there is no folder"), (".", "it is a folder")])
def test_a_benchmark_whose_result_cannot_be_written_does_not_start(run, tmp_path, command, name, reason):
    model = [] if command == "step" else [str(tmp_path / "no-model")]
    code, _, err = run("bench", command, *model, "--json", str(tmp_path / name))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"jaxserve: error: cannot write --json {str(tmp_path / name)!r}: {reason}")


def test_a_prompt_beyond_the_context_is_a_mistake_of_the_command_line(run, monkeypatch):
    def measure(*_, **__):
        raise PromptTooLongError("the prompt has 70 tokens; the model's context takes 64")

    monkeypatch.setattr("jaxserve.bench.speculative.measure_speculative", measure)
    code, _, err = run("bench", "speculative", "m")
    assert (code, err) == (2, "jaxserve: error: the prompt has 70 tokens; the model's context takes 64\n")


def test_collect_env_names_versions_and_devices(run):
    code, out, _ = run("collect-env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"python", "cpu", "cores", "jax", "jaxlib", "date"} <= facts.keys()
    assert facts["devices"]


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "jaxserve", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Serve language models with JAX" in done.stdout


def test_help_comes_without_importing_the_engine():
    code = """
import sys
from jaxserve.cli import main
slow = {"jax", "numpy", "openai", "httpx", "starlette", "uvicorn", "transformers", "tokenizers", "rich"}
print(sorted(slow & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
