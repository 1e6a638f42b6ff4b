"""`jaxserve bench throughput` on the model with random weights."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.bench.throughput import measure_throughput
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.config import Config, config_from_values
from tests.gpu.sizes import Sizes

_PREFILL_TOKENS = 2048  # a step


def works(sizes: Sizes) -> list[str]:
    """One."""
    return ["jaxserve"]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Nothing to prepare."""
    return lambda name: _measure(sizes)


def _measure(sizes: Sizes) -> dict[str, Any]:
    workload = Workload(
        num_prompts=sizes.throughput_requests,
        input_len=LengthRange(sizes.throughput_input, sizes.throughput_input),
        output_len=LengthRange(sizes.throughput_output, sizes.throughput_output),
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(sizes.model))
        report = measure_throughput(
            _config(folder, sizes), workload, in_process=True, on_progress=lambda line: print(line, file=sys.stderr)
        )
    (result,) = report.results
    wanted = ("output_tokens_per_s", "total_tokens_per_s", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p99")
    return {name: result[name] for name in wanted if name in result} | {
        "layers": sizes.model["num_hidden_layers"],
        "requests": sizes.throughput_requests,
        "input": sizes.throughput_input,
        "output": sizes.throughput_output,
    }


def _config(folder: str, sizes: Sizes) -> Config:
    """Two step sizes to compile, one of decodes and one with prompts, and a pool that holds every request whole.

    The engine as it serves compiles fourteen, takes steps of 8192 tokens, and sizes the pool by itself; this is what
    starts within the minute that the check has for it.
    """
    requests, length = sizes.throughput_requests, sizes.throughput_input + sizes.throughput_output
    return config_from_values(
        {
            "model": folder,
            "load_format": "dummy",
            "dtype": sizes.dtype,
            "device": sizes.device,
            "attention_backend": sizes.implementation,
            "max_model_len": length,
            "max_num_seqs": requests,
            "max_num_batched_tokens": _PREFILL_TOKENS,
            "token_buckets": (requests, _PREFILL_TOKENS),
            "num_gpu_blocks_override": requests * -(-length // sizes.block_size) + 1,
            "block_size": sizes.block_size,
        }
    )
