"""`DecoderConfig` reads config.json, and names what it cannot read."""

from __future__ import annotations

import pytest

from jaxserve.checkpoint_values import LARGEST
from jaxserve.errors import CheckpointError
from jaxserve.models.base import DecoderConfig
from tests.checkpoints import TINY


def test_sizes_that_follow_from_others_may_be_null() -> None:
    config = DecoderConfig.from_hf(TINY | {"num_key_value_heads": None, "head_dim": None, "sliding_window": None})
    assert (config.num_kv_heads, config.head_dim, config.sliding_window) == (8, 8, None)


@pytest.mark.parametrize(
    "name",
    ["rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"],
)
def test_a_null_where_a_number_must_be_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: '{name}' must be a positive .*, got None"):
        DecoderConfig.from_hf(TINY | {name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_dim", "64"),
        ("num_key_value_heads", 0),
        ("sliding_window", "wide"),
        ("max_position_embeddings", True),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_what_is_no_positive_number_is_named(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"'{name}' must be a positive"):
        DecoderConfig.from_hf(TINY | {name: value})


@pytest.mark.parametrize("name", LARGEST)
def test_a_size_beyond_any_model_is_refused_at_once(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^config\.json: '{name}' must be at most {LARGEST[name]}, got 4000000000$"
    ):
        DecoderConfig.from_hf(TINY | {name: 4_000_000_000})


def test_the_sizes_of_the_largest_models_are_read() -> None:
    llama_405b = {
        "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 10_485_760,
    }  # fmt: skip
    assert LARGEST.keys() == llama_405b.keys()
    assert DecoderConfig.from_hf(TINY | llama_405b).num_layers == 126


def test_a_window_that_is_switched_off_is_not_read() -> None:
    assert DecoderConfig.from_hf(TINY | {"sliding_window": 0, "use_sliding_window": False}).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 5}, "'architectures' must be a list of texts, got 5"),
        ({"architectures": "LlamaForCausalLM"}, "'architectures' must be a list of texts, got 'LlamaForCausalLM'"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false, got 'false'"),
        ({"attention_bias": 1}, "'attention_bias' must be true or false, got 1"),
        ({"rope_theta": "abc"}, "'rope_theta' must be a number above 1, got 'abc'"),
        ({"rope_theta": 0}, "'rope_theta' must be a number above 1, got 0"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be a JSON object, got 'linear'"),
        ({"rope_theta": 1e308}, r"'rope_theta' must be a number that float32 holds, .*, got 1e\+308"),
        ({"rope_theta": 10**400}, "'rope_theta' must be a number that float32 holds, .*, got 1000"),
        ({"rms_norm_eps": 1e-320}, "'rms_norm_eps' must be a number that float32 holds, .*, got 1e-320"),
        ({"sliding_window": 2**31}, "'sliding_window' must be at most 2147483647, got 2147483648"),
        ({"max_position_embeddings": 1}, "'max_position_embeddings' must be at least 2, .*, got 1"),
        ({"head_dim": 15}, r"head_dim \(15\) must be even"),
        ({"head_dim": None, "num_attention_heads": 128}, r"head_dim \(1\) must be even"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantization_config: safetensors quantised by 'awq' are not supported; give the model without "
            "quantisation, or as a GGUF file",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config: safetensors quantised by '<no quant_method>' are"),
        ({"quantization_config": "awq"}, "'quantization_config' must be a JSON object, got 'awq'"),
        ({"rope_parameters": [1]}, r"'rope_parameters' must be a JSON object, got \[1\]"),
        ({"rope_scaling": {"rope_type": ["a"]}}, r"'rope_type' must be text, got \['a'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "'factor' must be a positive number, got 'x'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' must be a positive number, got 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor' in rope_parameters"),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": {}}}, "rope_parameters that differ by layer type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": "a", "mscale_all_dim": 1}}, "'mscale' must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": []}}, "'mscale_all_dim'"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 128,
                }
            },
            r"low_freq_factor \(4\) must be less than high_freq_factor \(1\)",
        ),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: {message}"):
        DecoderConfig.from_hf(TINY | changes)
