"""Offline runs over a fake core, and the step benchmark over the real scheduler and batch builder."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from jax.stages import Compiled

from jaxserve.bench.latency import measure_latency
from jaxserve.bench.offline import config_for, run_in_core
from jaxserve.bench.step import WARM_UP_STEPS, measure_step
from jaxserve.bench.throughput import measure_throughput
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.config import load_config
from jaxserve.errors import ConfigError, RequestFailedError
from jaxserve.runner.packing import Packing
from jaxserve.runner.programs import Programs
from tests.engine.fake_core import FAIL_ROW, MAX_MODEL_LEN, FakeCore

WORKLOAD = Workload(num_prompts=8, input_len=LengthRange(4, 12), output_len=LengthRange(4, 6))


@pytest.fixture
def core() -> FakeCore:
    return FakeCore(load_config(None, {"model": "m"}, environ={}), on_progress=lambda text: None)


def test_an_offline_run_counts_each_requests_tokens(core):
    requests = WORKLOAD.requests(200)
    times, duration_s = run_in_core(core, requests)
    assert [each.num_output_tokens for each in times] == [request.output_len for request in requests]
    assert [each.num_prompt_tokens for each in times] == [len(request.prompt_token_ids) for request in requests]
    assert all(0 < each.ttft_s <= each.e2e_s <= duration_s for each in times)


def test_a_request_that_fails_ends_the_run(core):
    requests = WORKLOAD.requests(200)
    requests[3].prompt_token_ids[0] = FAIL_ROW
    with pytest.raises(RequestFailedError, match="nan in the logits"):
        run_in_core(core, [requests[3], *requests])


@pytest.mark.parametrize("measure", [measure_throughput, partial(measure_latency, batch_sizes=[1], num_iters=1)])
def test_requests_that_do_not_fit_the_context_are_a_mistake_of_the_command_line(monkeypatch, measure):
    monkeypatch.setattr("jaxserve.engine.core.EngineCore", FakeCore)
    config = load_config(None, {"model": "m"}, environ={})
    workload = replace(WORKLOAD, input_len=LengthRange(4, MAX_MODEL_LEN - 5))  # with the longest answer one too many
    with pytest.raises(
        ConfigError, match=r"\(4:2043\) and --output-len \(4:6\) come to 2049 tokens, .* is 2048; shorten"
    ):
        measure(config, workload, in_process=True, on_progress=lambda text: None)
    replace(WORKLOAD, input_len=LengthRange(4, MAX_MODEL_LEN - 6)).check_fits(MAX_MODEL_LEN)


def test_the_queue_has_room_for_all_requests():
    config = load_config(None, {"model": "m", "max_queued_requests": 4}, environ={})
    assert config_for(config, 100).scheduler.max_queued_requests == 100
    assert config_for(config, 2).scheduler.max_queued_requests == 4


def test_the_step_benchmark_times_all_of_a_step_but_the_model(monkeypatch):
    calls = Counter()

    def counted(name, method):
        def call(*arguments, **keywords):
            calls[name] += 1
            return method(*arguments, **keywords)

        return call

    monkeypatch.setattr(Packing, "pack_all", counted("pack", Packing.pack_all))
    monkeypatch.setattr(Compiled, "__call__", counted("program", Compiled.__call__))
    monkeypatch.setattr(Programs, "write_blocks", counted("write_blocks", Programs.write_blocks))
    result = measure_step(num_running=16, num_steps=5, input_len=20, max_model_len=4096).results[0]

    assert (result["requests"], result["steps"]) == (16, 5)
    parts = [result[f"{part}_ms_mean"] for part in ("schedule", "dispatch", "result")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(result["step_ms_mean"])
    num_steps = calls["pack"] // 2
    assert num_steps >= WARM_UP_STEPS + 5
    assert calls["write_blocks"] >= 5, "some rows fill a block in each step"
    assert calls["program"] == 2 * num_steps + calls["write_blocks"] + 16  # and a slot written for each request


def test_the_step_benchmark_needs_a_context_that_its_requests_fit_in():
    with pytest.raises(ConfigError, match="requests grow to 76 tokens; raise max_model_len, which is 64"):
        measure_step(num_running=16, num_steps=5, input_len=20, max_model_len=64)
