"""How large the checks are: what a GPU is asked, a shorter run of it, and a toy that a CPU runs to test the command."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention.runs import COLD_BYTES

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA_8B = _LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = _LLAMA | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TOY = TINY | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stages are asked."""

    name: str
    implementation: Implementation = "mosaic_gpu"  # under test
    baseline: Implementation = "xla"  # for the engine's tokens
    device: str = "cuda"  # as launch files name it
    dtype: str = "bfloat16"
    all_cases: bool = True  # of the kernels; else a few
    model: dict[str, Any]  # of the step and the throughput: config.json
    tokens_model: dict[str, Any]  # of the engine's tokens, beside the tiny one
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    context: int = 1024  # tokens of each sequence that decodes
    prompts: tuple[int, ...] = (1024, 2048, 8192)  # tokens of a sequence, in prefill
    prefill_tokens: int = 8192  # of a step
    block_size: int = 16
    cold_bytes: int = COLD_BYTES
    copy_bytes: int = 1 << 30
    product_size: int = 8192
    greedy_tokens: int = 48  # that each request of the engine check makes
    longest_prompt: int = 700
    throughput_requests: int = 192
    throughput_input: int = 1000
    throughput_output: int = 1000
    peer_s: float = 25.0  # that transformers decodes for
    peer_memory: float | None = None  # share (0, 1] of what is free that it may take; by default as it likes


FULL = Sizes(name="full", model=LLAMA_8B, tokens_model=LLAMA_8B | {"num_hidden_layers": 4})
QUICK = replace(
    FULL,
    name="quick",
    all_cases=False,
    model=LLAMA_8B | {"num_hidden_layers": 8},
    tokens_model=LLAMA_8B | {"num_hidden_layers": 2},
    batches=(1, 32, 256),
    prompts=(8192,),
    greedy_tokens=24,
    throughput_requests=64,
    throughput_output=200,
    peer_s=10.0,
)
TOY = Sizes(
    name="toy",
    implementation="xla",
    device="cpu",
    dtype="float32",
    all_cases=False,
    model=_TOY,
    tokens_model=_TOY,
    batches=(1, 4),
    context=48,
    prompts=(64,),
    prefill_tokens=64,
    cold_bytes=1 << 16,
    copy_bytes=1 << 22,
    product_size=128,
    greedy_tokens=6,
    longest_prompt=40,
    throughput_requests=4,
    throughput_input=16,
    throughput_output=8,
    peer_s=1.0,
    peer_memory=0.05,
)
SIZES = {sizes.name: sizes for sizes in (FULL, QUICK, TOY)}
