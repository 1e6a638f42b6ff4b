"""The config tree: types, combinations, secrets, and its way through JSON."""

import pytest

from jaxserve.config import FIELDS, REDACTED, Config, load_config
from jaxserve.errors import ConfigError


def make(**values) -> Config:
    return load_config(None, {"model": "m", **values}, environ={})


def error_of(**values) -> str:
    with pytest.raises(ConfigError) as raised:
        make(**values)
    return str(raised.value)


def test_a_config_comes_out_of_json_as_it_went_in():
    config = make(
        served_model_name=["a", "b"], hf_overrides={"rope": {"factor": 2.0}}, token_buckets=[16, 32], api_key="secret"
    )
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_config_never_changes():
    with pytest.raises(Exception, match="frozen"):
        make().server.port = 1  # type: ignore[misc]


def test_with_values_gives_a_checked_new_tree():
    config = make(port=80)
    assert config.with_values(block_size=32).cache.block_size == 32
    assert config.with_values(block_size=32).server.port == 80
    with pytest.raises(ConfigError, match="power of two"):
        config.with_values(block_size=33)


def test_every_setting_explains_itself():
    assert [name for name, field in FIELDS.items() if not field.info.description] == []


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2 * 1024**3), ("1.5 KiB", 1536), ("500MB", 500_000_000), ("4096", 4096), (4096, 4096)],
)
def test_sizes_may_be_written_with_units(text, num_bytes):
    assert make(kv_cache_memory_bytes=text).cache.kv_cache_memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("text", "count"), [("4k", 4000), ("4K", 4096), ("25.6k", 25_600), ("1M", 2**20), ("512", 512), (512, 512)]
)
def test_counts_may_be_written_as_vllm_reads_them(text, count):
    assert make(max_model_len=text).model.max_model_len == count


def test_one_value_stands_for_a_list_of_one():
    assert make(served_model_name="a").model.served_names == ("a",)
    assert make(token_buckets=16).runtime.token_buckets == (16,)
    assert make(token_buckets="16,32").runtime.token_buckets == (16, 32)


def test_a_model_without_served_names_goes_by_its_own():
    assert make().model.served_names == ("m",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seq": 1}, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"port": "80"}, "port must be an integer, got '80' (text)"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer, got True (true or false)"),
        ({"model": None}, "model must be text, got None (nothing)"),
        ({"model": ""}, "model must not be empty, got '' (text)"),
        ({"host": 1, "port": "x"}, "host must be text, got 1 (an integer); port must be an integer, got 'x' (text)"),
        ({"kv_cache_memory_bytes": "-1"}, "kv_cache_memory_bytes must be a number of bytes such as 2147483648, "),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be greater than 0, got 0 (an integer)"),
        (
            {"max_model_len": "1.5K"},
            "max_model_len must be an integer such as 4096, 4k (4000) or 4K (4096), got",
        ),
        ({"max_model_len": "0"}, "max_model_len must be at least 1, got 0 (an integer)"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill cannot be off: prompts are always computed in"),
        ({"hf_overrides": "[1]"}, "hf_overrides must be a mapping, got [1] (a list)"),
        ({"hf_overrides": "{a"}, "hf_overrides must be a JSON object (Expecting property name"),
        ({"token_buckets": "a,b"}, "token_buckets must be integers such as 16,32,64, got 'a,b' (text)"),
        ({"token_buckets": [32, 16]}, "token_buckets must be positive and ascending, got [32, 16]"),
        ({"token_buckets": []}, "token_buckets must be positive and ascending, got []"),
        ({"token_buckets": [16], "max_num_batched_tokens": 32}, "the largest of token_buckets (16) must reach"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_batched_tokens (4) must be at least max_num_seqs"),
        ({"block_size": 24}, "block_size must be a power of two, got 24"),
        (
            {"kv_cache_memory_bytes": 9, "num_gpu_blocks_override": 9},
            "kv_cache_memory_bytes and num_gpu_blocks_override",
        ),
        (
            {"attention_backend": "mosaic_tpu", "device": "cuda"},
            "attention_backend 'mosaic_tpu' needs device 'tpu', got",
        ),
        (
            {"model": "a.gguf", "load_format": "safetensors"},
            "load_format is 'safetensors', but model 'a.gguf' is a GGUF",
        ),
        (
            {"model": "org/name", "load_format": "gguf"},
            "load_format is 'gguf', but model 'org/name' is no .gguf file; leave it out",
        ),
        ({"max_model_len": 1}, "max_model_len must be at least 2, got 1 (an integer)"),
        ({"served_model_name": ["a", "a"]}, "served_model_name must hold different, non-empty names, got ['a', 'a']"),
        ({"api_key": ["  "]}, "api_key must not be empty: leave it out to serve without a key"),
    ],
)
def test_a_wrong_setting_gets_one_line_with_what_is_wanted(values, message):
    assert error_of(**values).startswith(message)


def test_api_keys_are_never_shown():
    config = make(api_key=["hunter2"])
    assert "hunter2" not in repr(config) + str(config) + str(config.redacted())
    assert config.redacted()["server"]["api_key"] == [REDACTED]
    assert "hunter2" not in error_of(api_key=["hunter2", 3])


def test_the_api_key_may_come_from_the_environment_but_a_flag_wins(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: m\napi_key: from-file\n")
    environ = {"JAXSERVE_API_KEY": "from-env"}
    assert load_config(path, environ=environ).server.api_key == ("from-env",)
    assert load_config(path, {"api_key": ["from-flag"]}, environ=environ).server.api_key == ("from-flag",)
    assert load_config(path, environ={}).server.api_key == ("from-file",)
