"""The roofline (Williams, Waterman and Patterson 2009): tokens a second if memory, arithmetic and links ran at peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxserve.errors import ConfigError
from jaxserve.plan.deployment import Deployment, bytes_of_a_device, elements_of_a_device
from jaxserve.plan.memory import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """An upper bound for one kind of step, on all devices together."""

    phase: Literal["decode", "prefill"]
    batch_size: int  # requests, on all data shards
    context: int  # tokens a request has in the KV cache (decode), or brings (prefill)
    step_ms: float
    tokens_per_s: float
    bound: Literal["memory", "compute", "links"]  # what takes longest


def decode_rate(deployment: Deployment, *, batch_size: int, context: int) -> Rate:
    """A token each for `batch_size` requests that have `context` tokens in the cache."""
    rows = -(-batch_size // deployment.num_data_shards)
    work = _Work.of(deployment, num_tokens=rows, num_rows=rows, num_scores=rows * context, num_read=rows * context)
    return work.rate("decode", deployment, batch_size=batch_size, context=context, num_tokens=batch_size)


def prefill_rate(deployment: Deployment) -> Rate:
    """The largest step, filled by one new prompt a data shard."""
    num_tokens = min(deployment.settings.max_num_batched_tokens, deployment.settings.max_model_len)
    num_scores = num_tokens * (num_tokens + 1) // 2  # causal
    work = _Work.of(deployment, num_tokens=num_tokens, num_rows=1, num_scores=num_scores, num_read=num_tokens)
    shards = deployment.num_data_shards
    return work.rate("prefill", deployment, batch_size=shards, context=num_tokens, num_tokens=shards * num_tokens)


def rates(deployment: Deployment, memory: Memory, *, batch_sizes: Sequence[int], context: int | None) -> list[Rate]:
    """Decode of each batch size (one request, and as many as run at once, where none is given), then prefill.

    `context` is half of max_model_len where none is given. Raises `ConfigError` for what the engine would not run.
    """
    context = context or max(1, memory.max_model_len // 2)
    if context > memory.max_model_len:
        raise ConfigError(f"--context is {context}, but max_model_len is {memory.max_model_len}")
    most = memory.num_requests(context)
    if batch_sizes and max(batch_sizes) > most:
        raise ConfigError(
            f"--batch-size {max(batch_sizes)} with {context} tokens each cannot run at once: at most {most} can, of "
            f"{memory.num_cached_tokens} tokens in the KV pools and {memory.max_num_seqs * memory.num_data_shards} "
            "requests at once (max_num_seqs); lower --batch-size or --context"
        )
    sizes = batch_sizes or sorted({1, most})
    decode = [decode_rate(deployment, batch_size=size, context=context) for size in sizes]
    return [*decode, prefill_rate(deployment)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What one device does in a step."""

    read_bytes: float
    flops: float
    sent_bytes: float

    @classmethod
    def of(cls, deployment: Deployment, *, num_tokens: int, num_rows: int, num_scores: int, num_read: int) -> _Work:
        """`num_tokens` pass the layers, `num_rows` the head; `num_scores` pairs of a query and a key are weighed, and
        `num_read` cached tokens read."""
        graph = deployment.graph
        model, spec, params = graph.config, graph.kv_cache_spec(), graph.abstract_params()
        shards, itemsize = model.num_shards, deployment.files.dtype.itemsize
        head = {name: params.pop(name) for name in graph.head_names()}
        layers = {name: value for name, value in params.items() if not name.startswith("embedding.")}
        weights = (sum(elements_of_a_device(v) for v in part.values() if len(v.shape) > 1) for part in (layers, head))
        in_layers, in_head = weights
        attention = 4 * num_scores * model.num_q_heads * model.head_dim * model.num_layers / shards
        hidden_bytes = num_tokens * model.hidden_size * itemsize
        ring = 2 * (shards - 1) / shards  # parts that each device sends of an array that is summed
        return cls(
            read_bytes=bytes_of_a_device([*layers.values(), *head.values()])
            + num_read * spec.block_bytes / spec.block_size / spec.num_shards,
            flops=2 * (in_layers * num_tokens + in_head * num_rows) + attention,
            sent_bytes=deployment.num_collectives()["forward"] * ring * hidden_bytes,
        )

    def rate(
        self,
        phase: Literal["decode", "prefill"],
        deployment: Deployment,
        *,
        batch_size: int,
        context: int,
        num_tokens: int,
    ) -> Rate:
        """Reading and computing overlap; what is sent has to wait for a sum, and be waited for."""
        kind = deployment.devices.kind
        memory_s, compute_s = self.read_bytes / kind.memory_bytes_per_s, self.flops / kind.flops_per_s
        links_s = self.sent_bytes / kind.link_bytes_per_s
        step_s = max(memory_s, compute_s) + links_s
        longest = max(memory_s, compute_s, links_s)
        return Rate(
            phase=phase,
            batch_size=batch_size,
            context=context,
            step_ms=step_s * 1e3,
            tokens_per_s=num_tokens / step_s,
            bound="links" if longest == links_s else "memory" if longest == memory_s else "compute",
        )
