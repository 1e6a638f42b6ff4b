"""`speculative_config`: JSON, YAML and Python alike, and one line that says what is wrong with it."""

from pathlib import Path

import pytest

from jaxserve.config import Config, load_config
from jaxserve.config_speculative import SpeculativeConfig
from jaxserve.errors import ConfigError


def make(value: object) -> Config:
    return load_config(None, {"model": "m", "speculative_config": value}, environ={})


def test_it_is_off_unless_asked_for():
    assert load_config(None, {"model": "m"}, environ={}).speculative.speculative_config is None


@pytest.mark.parametrize(
    "value",
    [
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}',
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        {"model": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4),
    ],
)
def test_it_may_be_json_a_mapping_or_vllms_older_spelling(value):
    config = make(value).speculative.speculative_config
    assert config == SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4)


@pytest.mark.parametrize("name", ["speculative_config", "speculative-config", "speculative"])
def test_a_launch_file_holds_it_as_a_mapping(tmp_path: Path, name: str):
    path = tmp_path / "launch.yaml"
    path.write_text(f"model: m\n{name}:\n  method: ngram\n  num_speculative_tokens: 7\n")
    config = load_config(path, environ={}).speculative.speculative_config
    assert config is not None and config.num_speculative_tokens == 7


def test_a_launch_file_may_hold_it_in_its_section_and_names_the_line_of_what_is_wrong(tmp_path: Path):
    path = tmp_path / "launch.yaml"
    path.write_text("model: m\nspeculative:\n  speculative_config: {method: ngram}\n")
    assert load_config(path, environ={}).speculative.speculative_config is not None
    path.write_text("model: m\nspeculative:\n  method: ngram\n  num_speculative_tokens: 0\n")
    with pytest.raises(ConfigError, match=r"launch.yaml:2: .*num_speculative_tokens must be at least 1"):
        load_config(path, environ={})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, (2, 5)), ({"min": 3}, (3, 3)), ({"max": 4}, (4, 4)), ({"max": 1}, (1, 1)), ({"min": 3, "max": 7}, (3, 7))],
)
def test_one_length_of_a_lookup_alone_is_both_as_in_vllm(given, wanted):
    config = make({"method": "ngram"} | {f"prompt_lookup_{end}": size for end, size in given.items()})
    config = config.speculative.speculative_config
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == wanted


def test_vllms_settings_of_the_draft_model_are_taken():
    settings = '{"model": "small", "revision": "v1", "max_model_len": 500, "draft_tensor_parallel_size": 1}'
    config = make(settings).speculative.speculative_config
    assert config == SpeculativeConfig(
        method="draft_model", model="small", revision="v1", max_model_len=500, draft_tensor_parallel_size=1
    )
    values = {"model": "m", "tensor_parallel_size": 2, "speculative_config": settings}
    for size in (1, 2):
        load_config(None, values | {"speculative_config": settings.replace("1}", f"{size}}}")}, environ={})
    for config, size in ((values, 4), ({"model": "m"}, 2)):
        asked = {"speculative_config": settings.replace("1}", f"{size}}}")}
        with pytest.raises(ConfigError, match=rf"draft_tensor_parallel_size must be 1 or tensor_.*, got {size}: what"):
            load_config(None, config | asked, environ={})


def test_it_comes_out_of_json_as_it_went_in():
    config = make({"method": "ngram"})
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert config.with_values(port=1).speculative == config.speculative


def test_a_model_alone_is_a_draft_model():
    config = make('{"model": "small"}').speculative.speculative_config
    assert config == SpeculativeConfig(method="draft_model", model="small")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (
            '{"method": "eagle3", "model": "head", "num_speculative_tokens": 3}',
            SpeculativeConfig(method="eagle3", model="head", num_speculative_tokens=3),
        ),
        ('{"method": "mtp", "num_speculative_tokens": 1}', SpeculativeConfig(method="mtp", num_speculative_tokens=1)),
        ('{"method": "mimo_mtp"}', SpeculativeConfig(method="mtp")),
    ],
)
def test_heads_are_named_as_vllm_names_them(value, wanted):
    assert make(value).speculative.speculative_config == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"method": "ngram", "num_speculative_tokens": 0}', r"num_speculative_tokens must be at least 1, got 0"),
        ('{"method": "ngram", "num_speculative_tokens": 1000}', r"num_speculative_tokens must be at most 32, got 1000"),
        ('{"method": "ngram", "num_speculative_tokens": "4"}', r"num_speculative_tokens must be an integer"),
        (
            '{"method": "medusa", "model": "x"}',
            r"a method that is built \(ngram, draft_model, eagle3, mtp\); 'medusa' is not",
        ),
        ('{"method": "draft_model"}', r"must have a model with method 'draft_model': the folder or hub id"),
        ('{"method": "eagle3"}', r"must have a model with method 'eagle3': the folder or hub id"),
        ('{"method": "eagle3", "model": "x", "num_speculative_tokens": 0}', r"must be at least 1, got 0"),
        ('{"method": "mtp", "num_speculative_tokens": 1000}', r"num_speculative_tokens must be at most 32, got 1000"),
        ('{"method": "ngram", "model": "small"}', r"must have no model with method 'ngram', which needs none"),
        ('{"method": "draft_model", "model": ""}', r"speculative_config.model must not be empty"),
        ('{"method": "magic"}', r"must name a method, one of ngram, draft_model, eagle3, mtp; it is 'magic'"),
        ("{}", r"must name a method, one of ngram, draft_model"),
        ("ngram", r"must be a JSON object"),
        ("3", r"must be a mapping, got 3"),
        ('{"method": "ngram", "k": 3}', r"speculative_config.k must not be given: there is no such setting"),
        ('{"method": "ngram", "revision": "v1"}', r"must have no revision \('v1'\) without a model that it is of"),
        ('{"method": "mtp", "max_model_len": 9}', r"must have no max_model_len \(9\) with method 'mtp': only a draft"),
        ('{"model": "x", "draft_tensor_parallel_size": 0}', r"draft_tensor_parallel_size must be at least 1, got 0"),
        ('{"method": "ngram", "prompt_lookup_max": 17}', r"prompt_lookup_max must be at most 16, got 17"),
        (
            '{"method": "ngram", "prompt_lookup_min": 7, "prompt_lookup_max": 5}',
            r"prompt_lookup_min \(7\) at most prompt_lookup_max \(5\)",
        ),
    ],
)
def test_what_is_wrong_is_named_in_one_line(value, message):
    with pytest.raises(ConfigError, match=message) as raised:
        make(value)
    assert "\n" not in str(raised.value)
