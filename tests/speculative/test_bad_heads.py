"""Heads that do not fit: one line that names what is wrong and what would be right, before the engine is up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxserve.engine.core import EngineCore
from jaxserve.errors import JaxserveError
from tests.checkpoints import save_random_llama
from tests.harness import tiny_config
from tests.speculative.heads import random_eagle3, save_eagle3, save_mimo

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return dict(random_eagle3(model).state_dict())


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mimo(tmp_path_factory.mktemp("mimo"))[0]


def refusal(target: Path, **speculative: Any) -> str:
    shapes = {"max_num_batched_tokens": 8, "token_buckets": (8,)}  # few programs to begin to compile
    with pytest.raises(JaxserveError) as raised:
        EngineCore(tiny_config(str(target), speculative_config=speculative, **shapes))
    message = str(raised.value)
    assert "\n" not in message
    return message


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


CONFIGS = [
    ({"vocab_size": 500}, "is for a vocabulary of 500 tokens, the model has 320; use a head that was trained for"),
    (
        {"target_hidden_size": 128},
        "is for a model of hidden size 128, this one has 64; use a head that was trained for",
    ),
    ({"hidden_size": 128}, "is for a model of hidden size 128, this one has 64"),
    (
        {"hidden_size": 32, "target_hidden_size": 64},
        "has hidden size 32, the model 64, so it cannot share the model's embedding and head: it must hold",
    ),
    ({"num_hidden_layers": 2}, "has 2 layers (num_hidden_layers); heads of 1 are supported"),
    (
        {"eagle_aux_hidden_state_layer_ids": None},
        "reads what enters layers [2, 1, 0], which must be three layers in order, from 0 to 3 (behind the last); name",
    ),
    ({"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}, "reads what enters layers [0, 1, 7], which must be"),
    ({"eagle_config": {"use_aux_hidden_state": False}}, "reads the model's last layer alone (use_aux_hidden_state)"),
    (
        {"eagle_aux_hidden_state_layer_ids": ["0", "1", "2"]},
        "config.json: 'eagle_aux_hidden_state_layer_ids' must be an integer from 0 to 2147483647, or a list of such, "
        "got ['0', '1', '2']",
    ),
    (
        {"eagle_aux_hidden_state_layer_ids": 3},
        "reads what enters layers [3], which must be three layers in order",
    ),
    (
        {
            "eagle_aux_hidden_state_layer_ids": None,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, None, 2]},
        },
        "config.json: 'eagle_aux_hidden_state_layer_ids' must be an integer from 0 to 2147483647, or a list of such, "
        "got [0, None, 2]",
    ),
    (
        {"eagle_aux_hidden_state_layer_ids": 0},
        "reads what enters layers [0], which must be three layers in order",
    ),
    ({"eagle_config": [1]}, "config.json: 'eagle_config' must be a JSON object, got [1]"),
    ({"draft_vocab_size": "240"}, "config.json: 'draft_vocab_size' must be a positive integer, got '240'"),
    ({"draft_vocab_size": -5}, "config.json: 'draft_vocab_size' must be a positive integer, got -5"),
    ({"target_hidden_size": "64"}, "config.json: 'target_hidden_size' must be a positive integer, got '64'"),
    ({"architectures": 3}, "config.json: 'architectures' must be a list of texts, got 3"),
    ({"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' is not supported, only 'silu'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_an_eagle3_head_of_other_sizes_is_refused_by_name(model, tensors, tmp_path, changes, message) -> None:
    head = save_eagle3(random_eagle3(model), tmp_path / "head", **changes)
    given = refusal(model, method="eagle3", model=str(head))
    assert given.startswith(f"draft head {str(head)!r}: {message}")


TENSORS = [
    (without("fc.weight"), "is no EAGLE-3 head: it has no 'fc.weight'"),
    (without("norm.weight"), "lacks 1 tensors of the model: norm.weight"),
    (without("lm_head.weight"), "lacks 1 tensors of the model: lm_head.weight"),
    (without("d2t"), "lacks 1 tensors of the model: d2t"),
    (with_tensor("midlayer.extra", torch.ones(3)), "holds 1 tensors that the model has no place for: midlayer.extra"),
    (
        with_tensor("fc.weight", torch.ones(64, 128)),
        "tensor 'fc.weight' has shape [64, 128], the model wants [64, 192]",
    ),
    (
        with_tensor("d2t", torch.full((240,), 100)),
        "d2t leads to tokens from 100 to 339, 240 in all; it must lead to 240 different tokens of the model's 320",
    ),
    (with_tensor("d2t", -torch.arange(240)), "d2t leads to tokens from 0 to 0, 1 in all"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_an_eagle3_head_with_other_tensors_is_refused_by_name(model, tensors, tmp_path, change, message) -> None:
    head = save_eagle3(random_eagle3(model), tmp_path / "head")
    save_file(change(tensors), head / "model.safetensors")
    given = refusal(model, method="eagle3", model=str(head))
    assert message in given
    assert str(head) in given


def test_a_model_is_no_head_and_a_head_no_draft_model(model, tmp_path) -> None:
    assert "is no EAGLE-3 head" in refusal(model, method="eagle3", model=str(model))
    head = save_eagle3(random_eagle3(model), tmp_path / "head")
    for architecture in ("LlamaForCausalLM", "LlamaForCausalLMEagle3"):  # SafeAILab's heads say the former
        save_eagle3(random_eagle3(model), head, architectures=[architecture])
        given = refusal(model, model=str(head))
        assert "is a draft head (draft_vocab_size); give the method 'eagle3' with it" in given
    assert "neither an existing path nor a hub id" in refusal(model, method="eagle3", model="no/such/head")


def test_an_mtp_head_that_is_not_there_or_of_another_make_is_refused(model, mimo, tmp_path) -> None:
    given = refusal(model, method="mtp")
    assert "architecture 'LlamaForCausalLM'; method 'mtp' knows the format of 'MiMoForCausalLM'" in given
    assert "DeepSeek-V3's (model.layers.*.eh_proj)" in given
    config = json.loads((mimo / "config.json").read_text())
    weights = load_file(mimo / "model.safetensors")
    bare = {name: value for name, value in weights.items() if "mtp_layers" not in name}
    for values, changes, message in (
        (bare, {}, "is missing: the checkpoint holds no tensors 'model.mtp_layers.0.*'"),
        (weights, {"num_nextn_predict_layers": 3}, "has num_nextn_predict_layers 3; one layer is supported"),
        (
            {name: value for name, value in weights.items() if "input_proj" not in name},
            {},
            "lacks 1 tensors of the model: model.mtp_layers.0.input_proj.weight",
        ),
        (
            weights | {"model.mtp_layers.0.extra": torch.ones(3)},
            {},
            "holds 1 tensors that the model has no place for: model.mtp_layers.0.extra",
        ),
    ):
        save_file(values, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert message in refusal(tmp_path, method="mtp")


def test_tensor_parallelism_that_the_head_cannot_be_split_over_is_refused(model, tmp_path) -> None:
    head = save_eagle3(random_eagle3(model), tmp_path / "head", intermediate_size=95)
    with pytest.raises(JaxserveError, match=r"draft head .*intermediate_size \(95\)"):
        config = tiny_config(
            str(model), tensor_parallel_size=2, speculative_config={"method": "eagle3", "model": str(head)}
        )
        EngineCore(config)
