"""What fits: bytes of weights, steps and KV pool on each device, as the engine would share them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.cache.kv_cache import RESERVED_BLOCKS
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.models.base import DecoderConfig
from jaxserve.plan.deployment import Deployment
from jaxserve.plan.devices import Devices
from jaxserve.runner.memory import (
    DeviceMemory,
    blocks_from_budget,
    blocks_on_device,
    fit_context,
    num_useful_blocks,
)

# Arrays of the logits' size that the sampler holds at most; 5 to 7.5 were compiled for the Llamas of configs/.
_LOGITS_HELD = 8
_MAX_DEVICES = 64  # the most that are suggested
_LEAST_TOKENS = 512  # of a step, that are suggested


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One device's memory in bytes, and what the KV pool of a data shard comes to."""

    limit_bytes: int  # what the engine may take
    weight_bytes: int
    step_bytes: int  # activations, logits, and what a step's arrays take beside pool and weights
    pool_bytes: int
    num_blocks: int  # of a data shard
    block_size: int  # tokens
    max_model_len: int
    num_data_shards: int
    max_num_seqs: int  # of a data shard

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the pools of all data shards hold."""
        return (self.num_blocks - RESERVED_BLOCKS) * self.block_size * self.num_data_shards

    @property
    def num_full_requests(self) -> int:
        """Requests of max_model_len that run at once, on all data shards."""
        return self.num_requests(self.max_model_len)

    def num_requests(self, context: int) -> int:
        """Requests with so many tokens that run at once, on all data shards."""
        blocks_each = -(-context // self.block_size)
        held = (self.num_blocks - RESERVED_BLOCKS) // blocks_each
        return min(held, self.max_num_seqs) * self.num_data_shards


def plan_memory(deployment: Deployment, *, step_bytes: int | None = None) -> Memory:
    """Share a device's memory out as the engine does; `ConfigError` where it does not go round.

    `step_bytes` is the compiler's count, where there is one, in place of an estimate.
    """
    config, spec, settings = deployment.config, deployment.spec, deployment.settings
    weight_bytes = deployment.weight_bytes()
    step_bytes = estimate_step_bytes(deployment) if step_bytes is None else step_bytes
    whole = deployment.devices.kind.memory_bytes
    limit_bytes = _limit_bytes(deployment)
    device = DeviceMemory(limit_bytes=limit_bytes, in_use_bytes=weight_bytes, step_bytes=step_bytes)
    num_blocks = blocks_from_budget(config.cache, spec)
    if num_blocks is None:
        useful = num_useful_blocks(spec, max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len)
        num_blocks = blocks_on_device(spec, device, num_useful=useful)
    pool_bytes = deployment.pool_bytes(num_blocks)
    taken = weight_bytes + step_bytes + pool_bytes
    if taken > whole:
        raise ConfigError(
            f"weights, steps and the KV pool that was asked for take {taken / 2**30:.1f} GiB, a device has "
            f"{whole / 2**30:.1f} GiB; lower kv_cache_memory_bytes or num_gpu_blocks_override"
        )
    return Memory(
        limit_bytes=limit_bytes,
        weight_bytes=weight_bytes,
        step_bytes=step_bytes,
        pool_bytes=pool_bytes,
        num_blocks=num_blocks,
        block_size=spec.block_size,
        max_model_len=fit_context(settings.max_model_len, config.model.max_model_len, spec, num_blocks),
        num_data_shards=deployment.num_data_shards,
        max_num_seqs=settings.max_num_seqs,
    )


def _limit_bytes(deployment: Deployment) -> int:
    """What the engine may take of a device."""
    return int(deployment.devices.kind.memory_bytes * deployment.config.cache.gpu_memory_utilization)


def activation_bytes(model: DecoderConfig, num_tokens: int, itemsize: int) -> int:
    """What one device may hold at once of so many tokens: hidden states a few times over, a share of gate and up."""
    return num_tokens * (6 * model.hidden_size + 4 * model.ffn_size // model.num_shards) * itemsize


def sampler_bytes(model: DecoderConfig, num_rows: int, max_model_len: int) -> int:
    """What one device's sampler may hold at once: its logits several times over, and each row's tokens."""
    return num_rows * (_LOGITS_HELD * -(-model.padded_vocab_size // model.num_shards) + max_model_len) * 4


def estimate_step_bytes(deployment: Deployment) -> int:
    """What steps take without a compiler's count: see `Programs.step_bytes`, of the model and of what drafts."""
    return sum(_step_bytes(deployment, model.graph.config) for model in deployment.models)


def _step_bytes(deployment: Deployment, model: DecoderConfig) -> int:
    """The larger of model and sampler once, what a step holds twice."""
    bucket, itemsize = deployment.buckets.all()[0], deployment.files.dtype.itemsize
    states = bucket.num_tokens * (1 + len(model.feature_layers)) + bucket.num_rows
    hidden = states * model.hidden_size * itemsize
    max_model_len, block_size = deployment.settings.max_model_len, deployment.graph.backend.geometry.block_size
    tables = (deployment.settings.max_num_seqs + 1) * (max_model_len + -(-max_model_len // block_size)) * 4
    rules = bucket.num_rows * model.vocab_size // 8
    activations = activation_bytes(model, bucket.num_tokens, itemsize)
    sampler = sampler_bytes(model, bucket.num_rows, max_model_len)
    return max(activations, sampler) + 2 * (hidden + tables + rules)


def plan_or_suggest(config: Config, devices: Devices) -> tuple[Deployment, Memory]:
    """The deployment and its memory; a `ConfigError` also names the settings that would fit, where there are any."""
    deployment = Deployment.of(config, devices)
    try:
        return deployment, plan_memory(deployment)
    except ConfigError as error:
        ways = [way for way in _ways_out(deployment) if way is not None]
        hint = f"; these would fit: {', or '.join(ways)}" if ways else "; nothing tried would fit"
        raise ConfigError(f"{config.model.model} does not fit {devices}: {error}{hint}") from error


def _ways_out(deployment: Deployment) -> Iterator[str | None]:
    """Of each kind of change, the smallest that fits: devices that are there, smaller steps, shorter texts, more
    devices."""
    config, devices = deployment.config, deployment.devices
    data, tensor = deployment.num_data_shards, config.parallel.tensor_parallel_size
    sizes = [n for n in range(tensor + 1, _MAX_DEVICES // data + 1) if deployment.files.decoder.can_split_over(n)]
    here = [n for n in sizes if n * data <= devices.count]
    more = [n for n in sizes if n * data > devices.count]
    yield _first((f"--tensor-parallel-size {n}", config.with_values(tensor_parallel_size=n), devices) for n in here)
    if deployment.weight_bytes() < _limit_bytes(deployment):
        yield _first(
            (f"--max-num-batched-tokens {n}", _smaller_steps(config, n), devices)
            for n in _halves(deployment.settings.max_num_batched_tokens, _LEAST_TOKENS)
        )
        yield _first(
            (f"--max-model-len {n}", config.with_values(max_model_len=n), devices)
            for n in _halves(deployment.settings.max_model_len, _LEAST_TOKENS)
        )
    yield _first(
        (f"--devices {larger} --tensor-parallel-size {n}", config.with_values(tensor_parallel_size=n), larger)
        for n in more
        for larger in [Devices(kind=devices.kind, count=n * data)]
    )


def _first(candidates: Iterator[tuple[str, Config, Devices]]) -> str | None:
    for name, config, devices in candidates:
        try:
            plan_memory(Deployment.of(config, devices))
        except ConfigError:
            continue
        return name
    return None


def _smaller_steps(config: Config, num_tokens: int) -> Config:
    max_num_seqs = min(config.scheduler.max_num_seqs or num_tokens, num_tokens)
    return config.with_values(max_num_batched_tokens=num_tokens, max_num_seqs=max_num_seqs, token_buckets=None)


def _halves(value: int, least: int) -> list[int]:
    """Half of it, a quarter, ... down to `least`.

    >>> _halves(4096, 1000)
    [2048, 1024]
    """
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves
