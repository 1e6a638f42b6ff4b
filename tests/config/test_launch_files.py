"""Launch files: YAML by sections or flat, and what is said of a wrong one."""

from pathlib import Path

import pytest

from jaxserve.config import Config, load_config
from jaxserve.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def launch_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "launch.yaml"
        path.write_text(text)
        return path

    return write


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, environ={})
    return str(raised.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_launch_file_loads(path):
    assert load_config(path, environ={}).model.served_model_name


def test_sections_and_flat_names_give_the_same_config(launch_file):
    by_section = load_config(launch_file("model:\n  model: m\ncache: {block-size: 32}\nserver:\n  port: 80\n"))
    flat = load_config(launch_file("model: m\nblock_size: 32\nport: 80\n"))
    assert by_section == flat == load_config(None, {"model": "m", "block-size": 32, "port": 80})


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(launch_file):
    path = launch_file("model: m\nport: 80\nblock_size: 32\n")
    config = load_config(path, {"port": 90})
    assert (config.server.port, config.cache.block_size, config.server.host) == (90, 32, "127.0.0.1")


def test_nothing_in_a_file_is_expanded(launch_file, monkeypatch):
    monkeypatch.setenv("NAME", "no")
    assert load_config(launch_file("model: ~/$NAME\n")).model.model == "~/$NAME"


def test_an_empty_section_keeps_its_defaults(launch_file):
    assert load_config(launch_file("model: m\ncache:\n")).cache.block_size is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nmodle: x\n", "launch.yaml:2: unknown setting 'modle'; did you mean 'model'?"),
        ("model: m\nserver:\n  prot: 1\n", "launch.yaml:3: unknown setting 'prot'; did you mean 'port'?"),
        ("model: m\nmax-num-sqs: 1\n", "launch.yaml:2: unknown setting 'max-num-sqs'; did you mean 'max_num_seqs'?"),
        ("model: m\nzzz: 1\n", "launch.yaml:2: unknown setting 'zzz'; 'jaxserve config --schema' lists all settings"),
        ("model: m\ncache:\n  port: 1\n", "launch.yaml:3: 'port' belongs to section 'server', not 'cache'"),
        ("model: m\ncache: 3\n", "launch.yaml:2: 'cache' is a section; its settings go below it, indented"),
        ("model: m\nport: 1\nport: 2\n", "launch.yaml:3: 'port' is set twice; first at launch.yaml:2"),
        ("port: 1\nserver: {port: 1}\nmodel: m\n", "launch.yaml:2: 'port' is set twice; first at launch.yaml:1"),
        ("model: m\nport: '80'\n", "launch.yaml:2: port must be an integer, got '80' (text)"),
        ("model: m\nport: [1]\n", "launch.yaml:2: port must be an integer, got [1] (a list)"),
        ("model: m\nserver:\n  port: 70000\n", "launch.yaml:3: port must be at most 65535, got 70000 (an integer)"),
        ("model: m\ndevice: gpu\n", "launch.yaml:2: device must be 'auto', 'cpu', 'cuda' or 'tpu', got 'gpu' (text)"),
        ("model: m\nport: [\n", "launch.yaml:3: not valid YAML: expected the node content, but found '<stream end>'"),
        ("model: m\n\tport: 1\n", "launch.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: m\n---\nmodel: n\n", "launch.yaml:2: not valid YAML: but found another document"),
        ("- model\n", "launch.yaml:1: a launch file must hold 'name: value' lines"),
        ("3: x\n", "launch.yaml:1: a setting's name must be text, got 3"),
        ("", "model is missing: give it in the launch file or as a flag"),
    ],
)
def test_a_wrong_file_gets_one_line_that_names_place_and_reason(launch_file, text, message):
    assert error_of(launch_file(text)) == message


def test_a_file_cannot_make_python_objects(launch_file):
    assert "not valid YAML" in error_of(launch_file("model: !!python/object/apply:os.getcwd []\n"))


def test_control_characters_are_refused_in_a_line(launch_file):
    assert error_of(launch_file("model: \x01\n")).startswith("launch.yaml: not valid YAML: unacceptable character")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read launch file '.*no\.yaml': No such file"):
        load_config(tmp_path / "no.yaml")


def test_the_schema_of_launch_files_knows_sections_and_flat_names():
    schema = Config.json_schema()
    assert {"server", "port", "model"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["ServerSettings"]["properties"]["port"]["maximum"] == 65535
