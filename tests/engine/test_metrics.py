"""Metrics carry vLLM's names, and count what happened."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.core_facts import CoreInfo, DraftCounts, EngineStats
from jaxserve.metrics import RequestTimer, ServerMetrics
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.sampling_params import SamplingParams

VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "request_success_total",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_bucket",
    "request_params_n_bucket",
    "iteration_tokens_total_bucket",
    "request_params_max_tokens_bucket",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "cache_config_info",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
]


def values_of(metrics):
    """name -> sum over its labels."""
    values = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


@pytest.mark.parametrize("prefix", ["jaxserve:", "vllm:"])
def test_the_names_are_vllms_under_the_prefix(prefix):
    metrics = ServerMetrics(model_name="m", prefix=prefix)
    metrics.set_engine_stats(EngineStats(drafts=DraftCounts().plus(2, 1)))
    for _ in range(2):
        metrics.set_core_info(CoreInfo(max_model_len=8, vocab_size=9, num_blocks=7, block_size=4, fingerprint="f"))

    values = values_of(metrics)

    assert [name for name in VLLM_NAMES if prefix + name not in values] == []
    assert b'num_gpu_blocks="7"' in metrics.render()


def test_two_servers_count_apart():
    first, second = ServerMetrics(model_name="m"), ServerMetrics(model_name="m")

    first.generation_tokens.inc()

    assert values_of(second)["jaxserve:generation_tokens_total"] == 0


def test_counters_of_the_engine_grow_by_differences_and_survive_its_death():
    metrics = ServerMetrics(model_name="m")

    for num_steps in (5, 8):
        metrics.set_engine_stats(EngineStats(num_steps=num_steps, num_running=2, kv_cache_usage=0.5))
    assert values_of(metrics)["jaxserve:num_requests_running"] == 2
    metrics.engine_died(is_restarting=True)
    assert values_of(metrics)["jaxserve:num_requests_running"] == 0
    metrics.set_engine_stats(EngineStats(num_steps=3))

    values = values_of(metrics)
    assert values["jaxserve:engine_steps_total"] == 11
    assert values["jaxserve:engine_restarts_total"] == 1


def test_accepted_drafts_are_counted_by_position():
    metrics = ServerMetrics(model_name="m")
    counts = DraftCounts().plus(2, 1)

    metrics.set_engine_stats(EngineStats(drafts=counts))
    metrics.set_engine_stats(EngineStats(drafts=counts.plus(3, 3)))

    values = values_of(metrics)
    assert values["jaxserve:spec_decode_num_drafts_total"] == 2
    assert values["jaxserve:spec_decode_num_draft_tokens_total"] == 5
    assert values["jaxserve:spec_decode_num_accepted_tokens_total"] == 4
    text = metrics.render().decode()
    for position, num_accepted in (("0", 2.0), ("1", 1.0), ("2", 1.0)):
        assert f'per_pos_total{{engine="0",model_name="m",position="{position}"}} {num_accepted}' in text


def test_a_requests_times_land_in_their_histograms():
    metrics = ServerMetrics(model_name="m")
    arrival_s = time.monotonic() - 2.0
    timer = RequestTimer(
        metrics=metrics, params=SamplingParams(n=2, max_tokens=9), num_prompt_tokens=7, arrival_time_s=arrival_s
    )

    timer.on_delta(TokenDelta("r-0", [1], queued_s=0.5, num_cached_tokens=4), arrival_s + 1.0)
    timer.on_delta(TokenDelta("r-1", [1], queued_s=0.9), arrival_s + 1.1)
    timer.on_delta(TokenDelta("r-0", [1, 1], FinishReason.STOP), arrival_s + 1.4)
    timer.on_end([3, 1], [FinishReason.STOP, FinishReason.ABORT])

    values = {name.removeprefix("jaxserve:"): value for name, value in values_of(metrics).items()}
    assert values["time_to_first_token_seconds_count"] == 1
    assert values["time_to_first_token_seconds_sum"] == pytest.approx(1.0)
    assert values["inter_token_latency_seconds_count"] == 2
    assert values["inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert values["request_queue_time_seconds_sum"] == pytest.approx(0.5)
    assert values["request_prefill_time_seconds_sum"] == pytest.approx(0.5)
    assert values["request_inference_time_seconds_sum"] == pytest.approx(1.5, abs=0.1)
    assert values["request_time_per_output_token_seconds_sum"] == pytest.approx(0.5, abs=0.1)
    assert (values["prompt_tokens_total"], values["prompt_tokens_cached_total"]) == (7, 4)
    assert values["generation_tokens_total"] == 4
    assert values["request_success_total"] == 2
    assert values["request_generation_tokens_sum"] == 4


def test_http_replies_are_counted_by_route_and_class():
    metrics = ServerMetrics(model_name="m")

    metrics.observe_http(handler="/v1/completions", method="POST", status=404, duration_s=0.2)

    assert b'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0' in metrics.render()
