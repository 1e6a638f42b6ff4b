"""Tiny draft heads as their makers publish them: random, trained by heart, or made so that they are always right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tests.checkpoints import TINY
from tests.speculative.reference_heads import Eagle3Reference, MiMoReference

LAYERS = (0, 1, 2)  # of the tiny model, whose inputs the head reads
DRAFT_VOCAB_SIZE = 240

EAGLE3_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": TINY["hidden_size"],
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": TINY["vocab_size"],
    "draft_vocab_size": DRAFT_VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,  # less than the model's, as published heads have it
    "tie_word_embeddings": False,
    "eagle_aux_hidden_state_layer_ids": list(LAYERS),
}


def model_features(folder: Path, token_ids: list[int], *, final: bool = False) -> torch.Tensor:
    """f32[tokens, features] of what a head reads of the model in `folder`, from transformers."""
    with torch.no_grad():
        output = transformers_model(folder).model(torch.tensor([token_ids]), output_hidden_states=True)
    states = output.hidden_states
    return states[-1][0] if final else torch.cat([states[layer][0] for layer in LAYERS], dim=-1)


def transformers_model(folder: Path) -> Any:
    """The checkpoint's model in eager float32; of MiMo its model without a head is Qwen2's."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    is_mimo = "MiMo" in (folder / "config.json").read_text()
    kind: Any = Qwen2ForCausalLM if is_mimo else LlamaForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def random_eagle3(model: Path, **changes: Any) -> Eagle3Reference:
    """A head with random weights and vocabulary for the model in `model`."""
    torch.manual_seed(3)
    config = EAGLE3_CONFIG | changes
    token_ids = torch.randperm(config["vocab_size"])[: config["draft_vocab_size"]].sort().values
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    head = Eagle3Reference(config, embedding, token_ids)
    _randomise(head)
    return head


def _randomise(head: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            is_norm = "norm" in name
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=0.2 if is_norm or "bias" in name else 0.15)


def save_eagle3(head: Eagle3Reference, folder: Path, **changes: Any) -> Path:
    """Write a head in SafeAILab's format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(EAGLE3_CONFIG | changes))
    return folder


def save_speculators(head: Eagle3Reference, folder: Path, **changes: Any) -> Path:
    """Write a head in the format of the speculators project: a nested config, an embedding, a numbered layer."""
    folder.mkdir(parents=True, exist_ok=True)
    layer = EAGLE3_CONFIG | changes
    outer = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": layer.pop("draft_vocab_size"),
        "norm_before_residual": layer.pop("norm_before_residual", False),
        "eagle_aux_hidden_state_layer_ids": layer.pop("eagle_aux_hidden_state_layer_ids"),
        "target_hidden_size": None,
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "proposal_methods": [{"speculative_tokens": 3}]},
    }
    tensors = {name.replace("midlayer", "layers.0"): value for name, value in head.state_dict().items()}
    save_file(tensors | {"embed_tokens.weight": head.embedding[0]}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def train_eagle3(model: Path, sequences: list[list[int]], *, num_steps: int = 100) -> Eagle3Reference:
    """A head that knows these sequences by heart: each token's guess, and each state as near as may be to the next.

    The sequences lie behind one another, and none sees another.
    """
    head = random_eagle3(model)
    known = torch.tensor(sorted({token_id for sequence in sequences for token_id in sequence}))
    others = torch.tensor([token_id for token_id in range(TINY["vocab_size"]) if token_id not in known])
    token_ids = torch.cat([known, others[: DRAFT_VOCAB_SIZE - len(known)]]).sort().values
    head = Eagle3Reference(EAGLE3_CONFIG, head.embedding[0], token_ids)
    features = torch.cat([model_features(model, sequence)[:-2] for sequence in sequences])
    read = torch.tensor([token_id for sequence in sequences for token_id in sequence[1:-1]])
    wanted = torch.searchsorted(token_ids, torch.tensor([t for sequence in sequences for t in sequence[2:]]))
    owner = torch.cat([torch.full((len(sequence) - 2,), index) for index, sequence in enumerate(sequences)])
    positions = torch.cat([torch.arange(len(sequence) - 2) for sequence in sequences])
    allowed = (owner[:, None] == owner) & (positions[:, None] >= positions)
    has_next = owner[1:] == owner[:-1]
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(num_steps):
        inputs = head.combine(features)
        states = head.advance(inputs, read, allowed, positions)
        loss = functional.cross_entropy(head.draft_logits(states), wanted)
        loss = loss + (states[:-1] - inputs[1:].detach())[has_next].pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head


def save_mimo(folder: Path, *, is_markov: bool = False) -> tuple[Path, MiMoReference]:
    """A tiny MiMo with its head, in one checkpoint.

    With `is_markov` the model's next token follows from the last one alone, and the head says the same: layers add
    nothing, and the head passes the token's embedding on to the final norm.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    values = {name: value for name, value in TINY.items() if name != "initializer_range"}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**values, initializer_range=0.25)).to(torch.float32)
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    config |= {"num_nextn_predict_layers": 1, "rope_theta": 10000.0}
    tensors = dict(model.state_dict())
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.normal_(std=0.3)
        if is_markov and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    head = MiMoReference(config, tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    _randomise(head)
    if is_markov:
        with torch.no_grad():
            head.self_attn.o_proj.weight.zero_()
            head.mlp.down_proj.weight.zero_()
            hidden = TINY["hidden_size"]
            head.input_proj.weight.copy_(torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1))
            head.token_layernorm.weight.fill_(1.0)
            head.final_layernorm.weight.copy_(tensors["model.norm.weight"])
    tensors |= {f"model.mtp_layers.0.{name}": value for name, value in head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, head
