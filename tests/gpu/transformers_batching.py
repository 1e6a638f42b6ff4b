"""transformers' continuous batching on the same model and prompts, for as long as the check has for it.

Only its decoding is counted: from when every request has its first token to the end of the time. Prompts cost it
nothing, so the figure is better than what a whole run would give.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jaxserve.bench.workload import LengthRange, Workload
from tests.gpu.sizes import Sizes

_MAX_PREFILL_S = 20.0
_REQUESTS = 64  # fewer than ours at most: its prompts alone would else take the time


def works(sizes: Sizes) -> list[str]:
    """One."""
    return ["transformers"]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """ModuleNotFoundError, in the work, where PyTorch or transformers is missing."""
    return lambda name: _measure(sizes)


def _measure(sizes: Sizes) -> dict[str, Any]:
    import torch  # neither is needed by the rest of the check
    from transformers import GenerationConfig

    requests = min(_REQUESTS, sizes.throughput_requests)
    workload = Workload(
        num_prompts=requests,
        input_len=LengthRange(sizes.throughput_input, sizes.throughput_input),
        output_len=LengthRange(sizes.throughput_output, sizes.throughput_output),
    )
    generation = GenerationConfig(
        max_new_tokens=sizes.throughput_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model = _model(torch, sizes)
    prompts = [request.prompt_token_ids for request in workload.requests(sizes.model["vocab_size"])]
    # It generates in a thread of its own, which an inference mode here does not reach: tensors of both would meet.
    with model.continuous_batching_context_manager(generation_config=generation) as manager:
        for prompt in prompts:
            manager.add_request(prompt, max_new_tokens=sizes.throughput_output, streaming=True)
        count, seconds = _counted(manager, requests, sizes)
    return {
        "output_tokens_per_s": count / seconds,
        "requests": requests,
        "seconds": seconds,
        "attention": model.config._attn_implementation,
        "layers": sizes.model["num_hidden_layers"],
    }


def _model(torch: Any, sizes: Sizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {name: value for name, value in sizes.model.items() if name not in ("architectures", "model_type")}
    torch.set_default_dtype(getattr(torch, sizes.dtype))
    with torch.device(sizes.device):
        return LlamaForCausalLM(LlamaConfig(**known, attn_implementation="sdpa")).eval()


def _counted(manager: Any, requests: int, sizes: Sizes) -> tuple[int, float]:
    """Tokens and seconds since all requests have their first token (or `_MAX_PREFILL_S` passed)."""
    lengths: dict[str, int] = {}
    start_s = time.perf_counter()
    begin: tuple[int, float] | None = None
    now_s, finished = start_s, 0
    while finished < requests and (begin is None or now_s - begin[1] < sizes.peer_s):
        result = manager.get_result(timeout=1.0)
        now_s = time.perf_counter()
        if result is not None:
            if result.error is not None:
                raise RuntimeError(f"transformers failed on a request: {result.error}")
            lengths[result.request_id] = len(result.generated_tokens)
            finished += result.is_finished()
        elif not manager.is_running():
            raise RuntimeError("transformers' generation thread ended")
        if begin is None and (len(lengths) == requests or now_s - start_s > _MAX_PREFILL_S):
            begin = (sum(lengths.values()), now_s)
    if begin is None or now_s == begin[1]:
        raise RuntimeError(f"no tokens in {now_s - start_s:.0f} s after the first")
    return sum(lengths.values()) - begin[0], now_s - begin[1]
