"""How many KV blocks: by number, by bytes, by what a device has left."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.config import CacheSettings
from jaxserve.errors import ConfigError
from jaxserve.runner.memory import (
    DeviceMemory,
    blocks_from_budget,
    blocks_on_cpu,
    blocks_on_device,
    fit_context,
    num_useful_blocks,
)

GIB = 1024**3
SPEC = KVCacheSpec(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype=jnp.bfloat16)
H100 = DeviceMemory(limit_bytes=72 * GIB, in_use_bytes=15 * GIB, step_bytes=2 * GIB)


def test_a_block_holds_k_and_v_of_all_layers() -> None:
    assert SPEC.block_bytes == 32 * 16 * 2 * 8 * 128 * 2


def test_a_number_wins_and_bytes_are_counted_a_device() -> None:
    assert blocks_from_budget(CacheSettings(num_gpu_blocks_override=7), SPEC) == 7
    four = blocks_from_budget(CacheSettings(kv_cache_memory_bytes=GIB), replace(SPEC, num_shards=4))
    assert four == 4 * GIB // SPEC.block_bytes
    assert blocks_from_budget(CacheSettings(), SPEC) is None


def test_a_device_gives_what_is_left_beside_weights_and_steps() -> None:
    blocks = blocks_on_device(SPEC, H100, num_useful=10**9)
    free = 0.98 * 72 * GIB - 17 * GIB
    assert 0.98 * free < blocks * SPEC.block_bytes <= free


def test_noise_in_free_memory_hardly_changes_the_number() -> None:
    weights = range(15 * GIB, 15 * GIB + 40 * 2**20, 2**20)
    memories = [DeviceMemory(limit_bytes=72 * GIB, in_use_bytes=taken, step_bytes=2 * GIB) for taken in weights]
    given = {blocks_on_device(SPEC, m, num_useful=10**9) for m in memories}
    assert len(given) <= 2


def test_more_blocks_than_all_sequences_can_use_are_not_taken() -> None:
    useful = num_useful_blocks(SPEC, max_num_seqs=2, max_model_len=100)
    assert useful == 2 * 7 + 1
    assert blocks_on_device(SPEC, H100, num_useful=useful) == useful
    assert blocks_on_cpu(SPEC, num_useful=useful) == useful


def test_a_model_that_leaves_no_room_says_how_much_it_takes() -> None:
    full = DeviceMemory(limit_bytes=22 * GIB, in_use_bytes=20 * GIB, step_bytes=3 * GIB)
    with pytest.raises(ConfigError, match=r"23\.0 GiB.*22\.0 GiB.*tensor_parallel_size"):
        blocks_on_device(SPEC, full, num_useful=100)


def test_a_budget_below_two_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        blocks_from_budget(CacheSettings(kv_cache_memory_bytes=SPEC.block_bytes), SPEC)


def test_a_context_that_nobody_asked_for_shrinks_to_the_pool_and_one_asked_for_does_not() -> None:
    assert fit_context(1000, None, SPEC, num_blocks=101) == 1000
    assert fit_context(8192, None, SPEC, num_blocks=101) == 1600
    with pytest.raises(ConfigError, match="max_model_len is 8192, but the KV pool holds 1600 tokens"):
        fit_context(8192, 8192, SPEC, num_blocks=101)


class Device:
    """A device as its memory statistics tell of it, after kernels were tried out on 9 GiB."""

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 60 * GIB, "bytes_in_use": 15 * GIB, "peak_bytes_in_use": 24 * GIB}


def test_what_compilation_took_for_a_while_does_not_count() -> None:
    memory = DeviceMemory.read(Device(), share=0.5, step_bytes=2 * GIB)
    assert memory == DeviceMemory(limit_bytes=30 * GIB, in_use_bytes=15 * GIB, step_bytes=2 * GIB)


def test_a_device_that_tells_nothing_asks_for_a_size() -> None:
    class Silent:
        def memory_stats(self) -> None:
            return None

    with pytest.raises(ConfigError, match="set kv_cache_memory_bytes"):
        DeviceMemory.read(Silent(), share=1.0, step_bytes=0)
