"""How many KV blocks: by number, by bytes, by what a device has left."""

from __future__ import annotations

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
H100 = DeviceMemory(limit_bytes=75 * GIB, peak_bytes=17 * GIB)


def test_a_block_holds_k_and_v_of_all_layers() -> None:
    assert SPEC.block_bytes == 32 * 16 * 2 * 8 * 128 * 2


def test_a_number_wins_and_bytes_are_counted_a_device() -> None:
    assert blocks_from_budget(CacheSettings(num_gpu_blocks_override=7), SPEC, num_devices=1) == 7
    four = blocks_from_budget(CacheSettings(kv_cache_memory_bytes=GIB), SPEC, num_devices=4)
    assert four == 4 * GIB // SPEC.block_bytes
    assert blocks_from_budget(CacheSettings(), SPEC, num_devices=1) is None


def test_a_device_gives_what_is_left_beside_the_largest_step() -> None:
    blocks = blocks_on_device(SPEC, H100, utilization=0.9, num_devices=1, num_useful=10**9)
    free = 0.9 * 75 * GIB - 17 * GIB
    assert 0.98 * free < blocks * SPEC.block_bytes <= free


def test_noise_in_free_memory_hardly_changes_the_number() -> None:
    peaks = range(17 * GIB, 17 * GIB + 40 * 2**20, 2**20)
    memories = [DeviceMemory(limit_bytes=75 * GIB, peak_bytes=peak) for peak in peaks]
    given = {blocks_on_device(SPEC, m, utilization=0.9, num_devices=1, num_useful=10**9) for m in memories}
    assert len(given) <= 2


def test_more_blocks_than_all_sequences_can_use_are_not_taken() -> None:
    useful = num_useful_blocks(SPEC, max_num_seqs=2, max_model_len=100)
    assert useful == 2 * 7 + 1
    assert blocks_on_device(SPEC, H100, utilization=0.9, num_devices=1, num_useful=useful) == useful
    assert blocks_on_cpu(SPEC, num_useful=useful) == useful


def test_a_model_that_leaves_no_room_says_how_much_it_takes() -> None:
    full = DeviceMemory(limit_bytes=24 * GIB, peak_bytes=23 * GIB)
    with pytest.raises(ConfigError, match=r"23\.0 GiB.*21\.6 GiB.*tensor_parallel_size"):
        blocks_on_device(SPEC, full, utilization=0.9, num_devices=1, num_useful=100)


def test_a_budget_below_two_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        blocks_from_budget(CacheSettings(kv_cache_memory_bytes=SPEC.block_bytes), SPEC, num_devices=1)


def test_a_context_that_nobody_asked_for_shrinks_to_the_pool_and_one_asked_for_does_not() -> None:
    assert fit_context(1000, None, SPEC, num_blocks=101) == 1000
    assert fit_context(8192, None, SPEC, num_blocks=101) == 1600
    with pytest.raises(ConfigError, match="max_model_len is 8192, but the KV pool holds 1600 tokens"):
        fit_context(8192, 8192, SPEC, num_blocks=101)
