"""Parts of parameters, as a host of several reads them: rows of the checkpoint's tensors, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.models.base import DecoderConfig, WeightRule
from jaxserve.models.registry import family
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.safetensors_files import SafetensorsCheckpoint
from jaxserve.weights.source import resolve_source
from tests.checkpoints import SMOLLM2, save_random_llama

NUM_SHARDS = 4


def assembled(checkpoint: Checkpoint, rule: WeightRule) -> np.ndarray:
    rows = rule.rows or tuple(range(shape[0]) for shape in rule.shapes)
    return rule.assemble([checkpoint.read_rows(name, some) for name, some in zip(rule.sources, rows, strict=True)])


def rules_of(checkpoint: Checkpoint, num_shards: int) -> list[WeightRule]:
    config = DecoderConfig.from_hf(checkpoint.hf_config())
    padding = -config.vocab_size % (num_shards * 128)
    config = replace(config, num_shards=num_shards, vocab_padding=padding)
    return family(config.architecture).weight_rules(config)


def check_parts(checkpoint: Checkpoint, rules: list[WeightRule]) -> int:
    """Each half of every parameter's first axis equals that half of the whole; how many came apart."""
    num_parts = 0
    for rule in rules:
        whole = rule.assemble([checkpoint.read(name) for name in rule.sources])
        assert whole.shape == rule.param_shape
        for rows in (range(whole.shape[0] // 2), range(whole.shape[0] // 2, whole.shape[0])):
            part = None if rule.part is None else rule.part(rows)
            if part is not None:
                num_parts += 1
                value = assembled(checkpoint, part)
                assert value.shape == part.param_shape
                np.testing.assert_array_equal(value, whole[rows.start : rows.stop])
    return num_parts


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_parts_of_safetensors_are_those_of_the_whole(tmp_path, kv_heads):
    folder = save_random_llama(
        tmp_path, num_key_value_heads=kv_heads, num_hidden_layers=1, vocab_size=331, attention_bias=True, mlp_bias=True
    )
    checkpoint = SafetensorsCheckpoint(folder)
    in_parts = 2 * (2 + 2 + 2)  # halves of: embedding and head; qkv and gate-up, weight and bias
    whole_qkv = 2 * 2  # of one KV head, every device has a copy
    assert check_parts(checkpoint, rules_of(checkpoint, NUM_SHARDS)) == in_parts - (whole_qkv if kv_heads == 1 else 0)


def test_parts_of_a_gguf_file_are_those_of_the_whole():
    checkpoint = open_checkpoint(resolve_source(SMOLLM2), dtype=np.float32)
    rules = [rule for rule in rules_of(checkpoint, 3) if rule.param.startswith(("embedding.", "layers.0."))]
    # Three KV heads have no halves: thirds instead.
    for rule in rules:
        if rule.part is not None and rule.param_shape[0] == 3:
            part = rule.part(range(1, 2))
            assert part is not None
            whole = rule.assemble([checkpoint.read(name) for name in rule.sources])
            np.testing.assert_array_equal(assembled(checkpoint, part), whole[1:2])
    assert check_parts(checkpoint, [rule for rule in rules if rule.param_shape[0] != 3]) == 2


def test_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = SafetensorsCheckpoint(save_random_llama(tmp_path, num_hidden_layers=1))
    read: list[int] = []
    whole = SafetensorsCheckpoint.read_rows

    def note(self: SafetensorsCheckpoint, name: str, rows: range) -> np.ndarray:
        values = whole(self, name, rows)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(SafetensorsCheckpoint, "read_rows", note)
    rules = {rule.param: rule for rule in rules_of(checkpoint, 2)}
    rule = rules["layers.0.attention.qkv.weight"]
    assert rule.part is not None
    part = rule.part(range(1))
    assert part is not None
    assert assembled(checkpoint, part).nbytes == sum(read) == np.prod(rule.param_shape) * 4 // 2
