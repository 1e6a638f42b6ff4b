"""PyTorch's scaled_dot_product_attention on contiguous keys: the figure beside ours, where PyTorch is installed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.gpu.attention_programs import decode_run, geometry_of, prefill_run
from tests.gpu.sizes import Sizes

_REPEATS = 15


def works(sizes: Sizes) -> list[str]:
    """Decodes by batch, prefills by prompt."""
    return [*(f"decodes/{batch}" for batch in sizes.batches), *(f"prompts/{prompt}" for prompt in sizes.prompts)]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """ModuleNotFoundError, in each work, where there is no PyTorch."""

    def measure(name: str) -> dict[str, Any]:
        kind, _, size = name.partition("/")
        return _decode(sizes, int(size)) if kind == "decodes" else _prefill(sizes, int(size))

    return measure


def _decode(sizes: Sizes, batch: int) -> dict[str, Any]:
    """As many cold copies of the keys as our kernel has blocks for."""
    run = decode_run(sizes, batch, has_prefill=False)
    median_s, min_s = _timed(sizes, rows=batch, queries=1, keys=sizes.context, sets=run.sets, calls=run.length)
    return {"batch": batch, "us": median_s * 1e6, "min_us": min_s * 1e6}


def _prefill(sizes: Sizes, prompt: int) -> dict[str, Any]:
    run = prefill_run(sizes, prompt)
    median_s, min_s = _timed(sizes, rows=run.rows, queries=prompt, keys=prompt, sets=1, calls=run.length)
    return {"prompt": prompt, "us": median_s * 1e6, "min_us": min_s * 1e6, "flops_per_s": run.flops / median_s}


def _timed(sizes: Sizes, *, rows: int, queries: int, keys: int, sets: int, calls: int) -> tuple[float, float]:
    """Median and minimum seconds of a call, of `calls` in one CUDA graph (on a CPU: in a row)."""
    import torch  # not one of the project's own dependencies, and slow to start

    geometry, device = geometry_of(sizes), torch.device(sizes.device)
    dtype = getattr(torch, sizes.dtype)

    def random(heads: int, length: int) -> Any:
        return torch.randn(rows, heads, length, geometry.head_dim, dtype=dtype, device=device)

    q = random(geometry.q_heads, queries)
    pairs = [(random(geometry.kv_heads, keys), random(geometry.kv_heads, keys)) for _ in range(sets)]

    def chain() -> None:
        out = q
        for index in range(calls):
            k, v = pairs[index % sets]
            out = torch.nn.functional.scaled_dot_product_attention(out, k, v, is_causal=queries > 1, enable_gqa=True)

    with torch.inference_mode():
        replay = _captured(torch, chain) if device.type == "cuda" else chain
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        samples = []
        for _ in range(_REPEATS):
            wait()
            begin_s = time.perf_counter()
            replay()
            wait()
            samples.append((time.perf_counter() - begin_s) / calls)
    return statistics.median(samples), min(samples)


def _captured(torch: Any, chain: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `chain`, warmed up on a stream of its own, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            chain()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph.replay
