"""The benchmark of drafts, on a model of random weights."""

import pytest

from jaxserve.bench.speculative import COLUMNS, CONVERSATIONS, measure_speculative
from jaxserve.config import config_from_values
from jaxserve.errors import ConfigError
from tests.e2e.tiny_model import write_config

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_it_compares_each_kind_at_each_batch_size(tmp_path):
    folder = write_config(tmp_path / "tiny")
    (tmp_path / "template").write_text(TEMPLATE)
    config = config_from_values(
        {
            "model": str(folder),
            "chat_template": str(tmp_path / "template"),
            "load_format": "dummy",
            "dtype": "float32",
            "device": "cpu",
            "hf_overrides": {"max_position_embeddings": 640},
            "max_num_seqs": 2,
            "max_num_batched_tokens": 64,
            "token_buckets": (64,),
            "num_gpu_blocks_override": 101,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        }
    )
    report = measure_speculative(config, batch_sizes=[1, 2], output_len=6, num_iters=1, on_progress=lambda line: None)
    assert [(row["kind"], row["batch size"]) for row in report.results] == [
        (kind, batch_size) for batch_size in (1, 2) for kind in CONVERSATIONS
    ]
    for row in report.results:
        assert set(row) == set(COLUMNS)
        num_answers = 2 * row["batch size"]
        assert row["same answers"] == f"{num_answers} of {num_answers}"


def test_without_drafts_there_is_nothing_to_compare():
    config = config_from_values({"model": "m"})
    with pytest.raises(ConfigError, match="give --speculative-config"):
        measure_speculative(config, batch_sizes=[1], output_len=1, num_iters=1, on_progress=lambda line: None)
