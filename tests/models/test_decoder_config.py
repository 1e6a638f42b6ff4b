"""`DecoderConfig` reads config.json, and names what it cannot read."""

from __future__ import annotations

import pytest

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


def test_a_window_that_is_switched_off_is_not_read() -> None:
    assert DecoderConfig.from_hf(TINY | {"sliding_window": 0, "use_sliding_window": False}).sliding_window is None
