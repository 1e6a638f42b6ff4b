"""How many KV blocks the pool gets: from a byte budget, or from what a device has left beside weights and steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import psutil

from jaxserve.cache.kv_cache import RESERVED_BLOCKS, KVCacheSpec
from jaxserve.config import CacheSettings
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

_CPU_BUDGET_BYTES = 2 * 1024**3  # a pool is touched once at start: 4 GiB more would cost a second
_CPU_SHARE = 0.5  # of the memory that is available when the server starts
_SPARE_SHARE = 0.02  # of a device's limit: pieces that freed arrays leave and that no array fits, compiled code


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device's memory once the weights are loaded and before the pool is made; bytes."""

    limit_bytes: int  # what this engine may take
    in_use_bytes: int  # what it has taken: the weights
    step_bytes: int  # what steps will take beside weights and pool

    @classmethod
    def read(cls, device: Any, *, share: float, step_bytes: int) -> DeviceMemory:
        """`share` is the part of the device's own limit that the engine may take.

        What steps take is the compiler's count. The device's peak would tell too much: while XLA tries kernels out, it
        holds copies of their operands, and it does not where a program comes from the compile cache, so that the pool
        would have another size at the second start.
        """
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ConfigError(
                f"device {device} does not tell how much memory it has; set kv_cache_memory_bytes to size the KV pool"
            )
        limit_bytes = int(stats["bytes_limit"] * share)
        sizes = (limit_bytes, stats["bytes_in_use"], step_bytes, stats["peak_bytes_in_use"])
        logger.info(
            "%s: %.2f GiB for this engine, %.2f GiB taken by weights, %.2f GiB wanted by steps; peak so far %.2f GiB",
            *(device, *(size / 2**30 for size in sizes)),
        )
        return cls(limit_bytes=limit_bytes, in_use_bytes=stats["bytes_in_use"], step_bytes=step_bytes)


def num_useful_blocks(spec: KVCacheSpec, *, max_num_seqs: int, max_model_len: int) -> int:
    """Blocks that `max_num_seqs` sequences of full length take; more would never be used."""
    return max_num_seqs * -(-max_model_len // spec.block_size) + RESERVED_BLOCKS


def blocks_from_budget(settings: CacheSettings, spec: KVCacheSpec) -> int | None:
    """What the settings fix by number or by bytes a device; None: it depends on the device."""
    if settings.num_gpu_blocks_override is not None:
        return settings.num_gpu_blocks_override
    if settings.kv_cache_memory_bytes is not None:
        return spec.num_blocks_in(settings.kv_cache_memory_bytes * spec.num_shards)
    return None


def blocks_on_cpu(spec: KVCacheSpec, *, num_useful: int, num_pools: int = 1) -> int:
    """The default on CPU: 2 GiB for all pools, at most half of what is available, at most what is useful."""
    budget = min(_CPU_BUDGET_BYTES, int(psutil.virtual_memory().available * _CPU_SHARE)) // num_pools
    return min(num_useful, _rounded(spec.num_blocks_in(budget)))


def blocks_on_device(spec: KVCacheSpec, memory: DeviceMemory, *, num_useful: int) -> int:
    """Blocks that fit beside weights and steps, and leave a little, on each of a pool's devices, all like this one."""
    taken = memory.in_use_bytes + memory.step_bytes
    free = memory.limit_bytes - taken - int(memory.limit_bytes * _SPARE_SHARE)
    if free <= 0:
        raise ConfigError(
            f"the weights and the largest step take {taken / 2**30:.1f} GiB of the {memory.limit_bytes / 2**30:.1f} "
            "GiB that gpu_memory_utilization allows; raise it, lower max_num_batched_tokens, or raise "
            "tensor_parallel_size"
        )
    num_blocks = spec.num_blocks_in(free * spec.num_shards)
    return min(num_useful, _rounded(num_blocks))


def fit_context(max_model_len: int, asked: int | None, spec: KVCacheSpec, num_blocks: int) -> int:
    """The context that a pool of `num_blocks` can hold: the model's, or less where nobody asked for a length.

    `ConfigError` if `asked`, the length that the launch config names, does not fit.
    """
    held = (num_blocks - RESERVED_BLOCKS) * spec.block_size
    if max_model_len <= held:
        return max_model_len
    if asked is None:
        logger.warning("the KV pool holds %d tokens: max_model_len is that, not the model's %d", held, max_model_len)
        return held
    needed = (-(-asked // spec.block_size) + RESERVED_BLOCKS) * spec.block_bytes
    raise ConfigError(
        f"max_model_len is {asked}, but the KV pool holds {held} tokens in {num_blocks} blocks: lower max_model_len to "
        f"{held}, or give the pool {needed / 2**30:.2f} GiB or more (kv_cache_memory_bytes, gpu_memory_utilization)"
    )


def _rounded(num_blocks: int) -> int:
    """Rounded down to seven significant bits, so that noise in free memory does not miss the compile cache.

    >>> _rounded(100), _rounded(10_001)
    (100, 9984)
    """
    unit = 1 << max(num_blocks.bit_length() - 7, 0)
    return num_blocks // unit * unit
