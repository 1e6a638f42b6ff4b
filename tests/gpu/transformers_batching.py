"""transformers' continuous batching on the same model and prompts, for as long as the check has for it.

There is no time for all of its tokens. What a run of them would give is reckoned from the time that the prompts took,
until every request had its first token, and the rate of decoding behind that. The sequences grow as long only later, so
the figure is better than what a whole run would give. Where the prompts take too long, the rest of them is part of what
is called decoding, and `started` says how many were done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
    from transformers import ContinuousBatchingConfig, GenerationConfig

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
    # It warms up first, and generates in a thread of its own, which an inference mode here does not reach: tensors of
    # both would meet.
    batching = ContinuousBatchingConfig(max_memory_percent=sizes.peer_memory)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        start_s = time.perf_counter()
        for prompt in prompts:
            manager.add_request(prompt, max_new_tokens=sizes.throughput_output, streaming=True)
        observed = _observed(manager, requests, sizes, start_s)
    return {
        **figures(observed, requests * sizes.throughput_output),
        "requests": requests,
        "attention": model.config._attn_implementation,
        "layers": sizes.model["num_hidden_layers"],
    }


class Observed(NamedTuple):
    """Part of a run: `prompt_tokens` came in `prompt_s`, the first of `started` requests, and then `tokens`."""

    started: int
    prompt_tokens: int
    prompt_s: float
    tokens: int
    decoding_s: float


def figures(observed: Observed, total: int) -> dict[str, float]:
    """Of a run of `total` tokens that goes on as it was observed."""
    decoding = observed.tokens / observed.decoding_s
    return {
        "output_tokens_per_s": total / (observed.prompt_s + (total - observed.prompt_tokens) / decoding),
        "decoding_tokens_per_s": decoding,
        "started": observed.started,
        "prompt_s": observed.prompt_s,
        "decoding_s": observed.decoding_s,
    }


def _model(torch: Any, sizes: Sizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {name: value for name, value in sizes.model.items() if name not in ("architectures", "model_type")}
    torch.set_default_dtype(getattr(torch, sizes.dtype))
    with torch.device(sizes.device):
        return LlamaForCausalLM(LlamaConfig(**known, attn_implementation="sdpa")).eval()


def _observed(manager: Any, requests: int, sizes: Sizes, start_s: float) -> Observed:
    """The prompts of a run that began at `start_s`, of as many as there is time for, and some decoding."""
    lengths: dict[str, int] = {}
    begin: tuple[int, int, float] | None = None
    now_s, finished = start_s, 0
    while finished < requests and (begin is None or now_s - begin[-1] < sizes.peer_s):
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
            begin = (len(lengths), sum(lengths.values()), now_s)
    if begin is None or sum(lengths.values()) == begin[1]:
        raise RuntimeError(f"no tokens in {now_s - start_s:.0f} s after the first")
    started, tokens, begin_s = begin
    return Observed(started, tokens, begin_s - start_s, sum(lengths.values()) - tokens, now_s - begin_s)
