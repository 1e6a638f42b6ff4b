"""Prometheus metrics of one server, under vLLM's names: `ServerMetrics` is fed by the engine client and the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from jaxserve.engine.core_facts import CoreInfo, DraftCounts, EngineStats
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.sampling_params import SamplingParams

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_HTTP_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ITERATION_BUCKETS = (1, *(2**power for power in range(3, 15)))  # tokens
_N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)


class ServerMetrics:
    """All metrics of one server, in a registry of their own. `prefix` is "jaxserve:" or "vllm:"."""

    def __init__(self, *, model_name: str, max_model_len: int = 131072, prefix: str = "jaxserve:") -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._last_stats = EngineStats()
        token_buckets = _one_two_five(max_model_len)

        self._num_running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._num_waiting = self._gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        self._kv_cache_usage = self._gauge("kv_cache_usage_perc", "KV cache in use; 1 is all of it.")

        self._cache_config = Gauge(
            f"{prefix}cache_config_info", "Size of the KV cache, in the labels.",
            ["block_size", "num_gpu_blocks", "engine"], registry=self._registry,
        )  # fmt: skip

        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Requests preempted to free blocks.")
        self._steps = self._counter("engine_steps", "Steps the engine ran.")
        self._drafts = _DraftCounters(self._counter, prefix, self._labels, self._registry)
        self._late_compiles = self._counter("compiles_after_ready", "Compilations while serving; should stay 0.")
        self._engine_restarts = self._counter("engine_restarts", "Times the engine process was started again.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Of these, found in the prefix cache.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")

        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step, over all requests.", _ITERATION_BUCKETS
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS_S
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between one token and the next of a sequence.", _ITL_BUCKETS_S
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time a token after the first, per request.", _ITL_BUCKETS_S
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_BUCKETS_S)
        self.queue_time = self._histogram("request_queue_time_seconds", "Time spent waiting.", _REQUEST_BUCKETS_S)
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "From the first time scheduled to the end.", _REQUEST_BUCKETS_S
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first time scheduled to the first token.", _REQUEST_BUCKETS_S
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the end.", _REQUEST_BUCKETS_S
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens.", token_buckets)
        self.prefill_computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not in the prefix cache.", token_buckets
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens, per sequence.", token_buckets
        )
        self.request_max_tokens = self._histogram("request_params_max_tokens", "The max_tokens asked.", token_buckets)
        self.request_max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", "Generated tokens of a request's longest sequence.", token_buckets
        )
        self.request_n = self._histogram("request_params_n", "The n asked.", _N_BUCKETS)

        success = Counter(
            f"{prefix}request_success", "Sequences that ended, by reason.",
            ["finished_reason", *self._labels], registry=self._registry,
        )  # fmt: skip
        self._success = {
            reason: success.labels(finished_reason=reason.value, **self._labels) for reason in FinishReason
        }
        self._http = HttpMetrics(self._registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format; serve with `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    async def collect(self) -> bytes:
        """What GET /metrics answers: those of this process, which are the whole server's."""
        return self.render()

    def set_core_info(self, info: CoreInfo) -> None:
        """Publish what is fixed for this engine, as labels of a gauge that is always 1."""
        self._cache_config.clear()
        self._cache_config.labels(block_size=info.block_size, num_gpu_blocks=info.num_blocks, engine="0").set(1)

    def set_engine_stats(self, stats: EngineStats) -> None:
        """Take over the engine's gauges, and what its counters grew by since the last time."""
        last = self._last_stats
        self._num_running.set(stats.num_running)
        self._num_waiting.set(stats.num_waiting)
        self._kv_cache_usage.set(stats.kv_cache_usage)
        self._prefix_queries.inc(max(0, stats.prefix_queried_tokens - last.prefix_queried_tokens))
        self._prefix_hits.inc(max(0, stats.prefix_hit_tokens - last.prefix_hit_tokens))
        self._preemptions.inc(max(0, stats.num_preemptions - last.num_preemptions))
        self._steps.inc(max(0, stats.num_steps - last.num_steps))
        self._late_compiles.inc(max(0, stats.num_compiles_after_ready - last.num_compiles_after_ready))
        self._drafts.add(stats.drafts, last.drafts)
        self._last_stats = stats

    def engine_died(self, *, is_restarting: bool) -> None:
        """Its gauges go to zero, and the next engine's counters start from zero."""
        self.set_engine_stats(EngineStats())
        if is_restarting:
            self._engine_restarts.inc()

    def sequence_finished(self, reason: FinishReason) -> None:
        """Count the end of one sequence."""
        self._success[reason].inc()

    def observe_http(self, *, handler: str, method: str, status: int, duration_s: float) -> None:
        """Record a reply; `handler` is the route's pattern, never the raw path."""
        self._http.observe(handler=handler, method=method, status=status, duration_s=duration_s)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(self._prefix + name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(self._prefix + name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            self._prefix + name, text, list(self._labels), buckets=tuple(buckets), registry=self._registry
        )
        return family.labels(**self._labels)


class HttpMetrics:
    """Replies of an HTTP server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("http_requests", "HTTP requests.", ["handler", "method", "status"], registry=registry)
        self._duration = Histogram(
            "http_request_duration_seconds", "Time to the end of the reply.",
            ["handler", "method"], buckets=_HTTP_BUCKETS_S, registry=registry,
        )  # fmt: skip

    def observe(self, *, handler: str, method: str, status: int, duration_s: float) -> None:
        """Record a reply; `handler` is the route's pattern, never the raw path."""
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._duration.labels(handler, method).observe(duration_s)


class _DraftCounters:
    """Speculative decoding in numbers."""

    def __init__(
        self,
        counter: Callable[[str, str], Counter],
        prefix: str,
        labels: dict[str, str],
        registry: CollectorRegistry,
    ) -> None:
        self._labels = labels
        self._num_drafts = counter("spec_decode_num_drafts", "Times a sequence had draft tokens in a step.")
        self._num_draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens computed.")
        self._num_accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._num_accepted_at = Counter(
            f"{prefix}spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by place among the drafts.",
            [*labels, "position"], registry=registry,
        )  # fmt: skip

    def add(self, now: DraftCounts, last: DraftCounts) -> None:
        """Take over what the counts grew by."""
        self._num_drafts.inc(max(0, now.num_drafts - last.num_drafts))
        self._num_draft_tokens.inc(max(0, now.num_draft_tokens - last.num_draft_tokens))
        self._num_accepted.inc(max(0, now.num_accepted_tokens - last.num_accepted_tokens))
        pairs = zip_longest(now.accepted_per_position, last.accepted_per_position, fillvalue=0)
        for position, (count, last_count) in enumerate(pairs):
            self._num_accepted_at.labels(**self._labels, position=str(position)).inc(max(0, count - last_count))


@dataclass(slots=True, kw_only=True)
class RequestTimer:
    """One request's times, written into the metrics as its deltas arrive. Times are `time.monotonic()`."""

    metrics: ServerMetrics
    params: SamplingParams
    num_prompt_tokens: int
    arrival_time_s: float
    queued_s: float = 0.0
    first_token_time_s: float | None = None
    _last_token_times_s: dict[str, float] = field(default_factory=dict)  # by sequence

    def on_delta(self, delta: TokenDelta, now_s: float) -> None:
        """Record a delta of one of the request's sequences."""
        if delta.queued_s is not None and self.first_token_time_s is None:
            self.queued_s = delta.queued_s
        num_tokens = len(delta.token_ids)
        if not num_tokens:
            return
        metrics = self.metrics
        metrics.generation_tokens.inc(num_tokens)
        last_time_s = self._last_token_times_s.get(delta.request_id)
        self._last_token_times_s[delta.request_id] = now_s
        if last_time_s is not None:
            for _ in range(num_tokens):
                metrics.inter_token_latency.observe((now_s - last_time_s) / num_tokens)
        elif self.first_token_time_s is None:
            self.first_token_time_s = now_s
            metrics.time_to_first_token.observe(now_s - self.arrival_time_s)
            metrics.prompt_tokens.inc(self.num_prompt_tokens)
            metrics.prompt_tokens_cached.inc(delta.num_cached_tokens or 0)
            metrics.prefill_computed_tokens.observe(self.num_prompt_tokens - (delta.num_cached_tokens or 0))

    def on_end(self, num_output_tokens: list[int], reasons: list[FinishReason]) -> None:
        """Record the end of the request, whatever ended it; `num_output_tokens` has an entry a sequence."""
        metrics = self.metrics
        now_s = time.monotonic()
        for reason in reasons:
            metrics.sequence_finished(reason)
        metrics.e2e_latency.observe(now_s - self.arrival_time_s)
        metrics.request_prompt_tokens.observe(self.num_prompt_tokens)
        metrics.request_n.observe(self.params.n)
        metrics.request_max_tokens.observe(self.params.max_tokens or 0)
        metrics.request_max_generation_tokens.observe(max(num_output_tokens))
        for num_tokens in num_output_tokens:
            metrics.request_generation_tokens.observe(num_tokens)
        first_token_time_s = self.first_token_time_s
        if first_token_time_s is None:
            return
        metrics.queue_time.observe(self.queued_s)
        metrics.inference_time.observe(max(0.0, now_s - self.arrival_time_s - self.queued_s))
        metrics.prefill_time.observe(max(0.0, first_token_time_s - self.arrival_time_s - self.queued_s))
        metrics.decode_time.observe(now_s - first_token_time_s)
        if max(num_output_tokens) > 1:
            metrics.time_per_output_token.observe((now_s - first_token_time_s) / (max(num_output_tokens) - 1))


def _one_two_five(limit: int) -> list[float]:
    """Bucket borders 1, 2, 5, 10, 20, 50 ... up to `limit`.

    >>> _one_two_five(30)
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    borders = (float(factor * 10**power) for power in range(len(str(limit))) for factor in (1, 2, 5))
    return [border for border in borders if border <= limit]
