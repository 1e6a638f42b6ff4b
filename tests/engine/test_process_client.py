"""Requests through the real engine process with a fake core: streams, n, stop strings, aborts, refusals."""

import asyncio
import time

import psutil
import pytest

from jaxserve.engine.client import EngineState
from jaxserve.errors import (
    CheckpointError,
    InvalidRequestError,
    JaxserveError,
    QueueFullError,
    RequestFailedError,
    ServerDrainingError,
)
from jaxserve.outputs import FinishReason
from jaxserve.sampling_params import SamplingParams
from tests.engine.fake_core import FAIL_ROW, REJECT, expected_tokens


async def collect(iterator):
    return [output async for output in iterator]


async def test_an_answer_streams_as_deltas(fake_client):
    async with fake_client({"step_s": 0.02}) as client:
        params = SamplingParams(max_tokens=5, output_kind="delta")
        outputs = await collect(client.generate("abc", params, request_id="r"))

    assert [output.outputs[0].text for output in outputs] == list("abcab")
    assert [output.finished for output in outputs] == [False] * 4 + [True]
    assert outputs[-1].outputs[0].finish_reason is FinishReason.LENGTH
    assert client.num_live_requests == 0


async def test_n_sequences_of_many_requests_run_side_by_side(fake_client):
    async with fake_client() as client:
        params = SamplingParams(n=3, max_tokens=20, seed=1, output_kind="final_only")
        answers = await asyncio.gather(
            *(collect(client.generate([i, i + 1], params, request_id=f"r{i}")) for i in range(20))
        )

    for i, [output] in enumerate(answers):
        assert [completion.token_ids for completion in output.outputs] == [expected_tokens([i, i + 1], 20)] * 3
        assert [completion.seed for completion in output.outputs] == [1, 2, 3]


async def test_a_stop_string_ends_the_sequence_in_the_engine_too(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record), "step_s": 0.005}) as client:
        [output] = await collect(
            client.generate("abcdef", SamplingParams(stop=["de"], output_kind="final_only"), request_id="r")
        )
        await wait_for(lambda: record.exists())

    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("abc", "de")
    assert int(record.read_text().split()[1]) < 50


async def test_closing_the_iterator_aborts_in_the_engine(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record)}) as client:
        iterator = client.generate("abc", SamplingParams(n=2), request_id="r")
        await anext(iterator)
        await iterator.aclose()
        await wait_for(lambda: record.exists() and len(record.read_text().splitlines()) == 2)

    assert client.num_live_requests == 0


async def test_cancelling_the_task_aborts_in_the_engine(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record)}) as client:
        task = asyncio.create_task(collect(client.generate("abc", SamplingParams(), request_id="r")))
        await asyncio.sleep(0.05)
        task.cancel()
        await wait_for(lambda: record.exists())


async def test_an_aborted_request_ends_with_what_it_has(fake_client):
    async with fake_client() as client:
        iterator = client.generate("abc", SamplingParams(), request_id="r")
        await anext(iterator)
        await client.abort("r")
        await client.abort("unknown")
        *_, last = await collect(iterator)

    assert last.finished
    assert last.outputs[0].finish_reason is FinishReason.ABORT
    assert last.outputs[0].text.startswith("a")


async def test_an_id_can_be_used_again_right_after_an_abort(fake_client):
    async with fake_client({"step_s": 0}) as client:
        for prompt in ("abc", "def"):
            iterator = client.generate(prompt, SamplingParams(), request_id="r")
            output = await anext(iterator)
            await iterator.aclose()

    assert output.outputs[0].text.startswith("d")


async def test_a_live_request_id_cannot_be_used_twice(fake_client):
    async with fake_client() as client:
        first = client.generate("abc", SamplingParams(), request_id="r")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="'r' is in use"):
            await collect(client.generate("abc", SamplingParams(), request_id="r"))
        assert (await anext(first)).outputs[0].text.startswith("abc"[:1])
        await first.aclose()


async def test_a_refusal_of_the_engine_arrives_with_its_type_and_fields(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record)}) as client:
        with pytest.raises(QueueFullError, match="the fake queue is full") as raised:
            await collect(client.generate([REJECT], SamplingParams(n=3), request_id="r"))
        # The two sequences that were taken before the third was refused are dropped again.
        assert len(record.read_text().splitlines()) == 2

    assert raised.value.retry_after_s == 7


async def test_a_row_that_fails_ends_alone(fake_client):
    async with fake_client() as client:
        good = asyncio.create_task(collect(client.generate("abc", SamplingParams(max_tokens=30), request_id="good")))
        with pytest.raises(RequestFailedError, match="nan in the logits"):
            await collect(client.generate([FAIL_ROW], SamplingParams(), request_id="bad"))
        assert len((await good)[-1].outputs[0].token_ids) == 30


async def test_a_slow_reader_gets_merged_outputs(fake_client):
    async with fake_client() as client:
        iterator = client.generate("abc", SamplingParams(max_tokens=50, output_kind="delta"), request_id="r")
        first = await anext(iterator)
        await asyncio.sleep(0.3)
        rest = await collect(iterator)

    assert len(rest) == 1
    assert first.outputs[0].token_ids + rest[0].outputs[0].token_ids == expected_tokens(first.prompt_token_ids, 50)


async def test_a_long_prompt_does_not_hold_up_the_event_loop(fake_client):
    async with fake_client() as client:
        lags = []

        async def measure():
            while True:
                start = time.perf_counter()
                await asyncio.sleep(0.001)
                lags.append(time.perf_counter() - start)

        task = asyncio.create_task(measure())
        with pytest.raises(InvalidRequestError, match="200000 tokens"):
            await collect(client.generate("ab" * 100_000, SamplingParams(), request_id="r"))
        task.cancel()

    assert max(lags) < 0.1  # generous, for busy machines; in line it takes half a second


async def test_bad_requests_are_refused_and_leave_nothing_behind(fake_client):
    async with fake_client() as client:
        for prompt, params in [("", {}), ([300], {}), ("a", {"temperature": -1}), ("a", {"max_tokens": 10**6})]:
            with pytest.raises(InvalidRequestError):
                await collect(client.generate(prompt, SamplingParams(**params), request_id="r"))
        assert client.num_live_requests == 0


async def test_draining_waits_for_running_requests_and_refuses_new_ones(fake_client):
    async with fake_client({"step_s": 0.01}) as client:
        running = asyncio.create_task(collect(client.generate("abc", SamplingParams(max_tokens=20), request_id="r")))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(client.drain(timeout_s=5))
        await asyncio.sleep(0.01)
        assert client.health.state is EngineState.DRAINING
        with pytest.raises(ServerDrainingError):
            await collect(client.generate("abc", SamplingParams(), request_id="new"))
        assert await draining
        assert (await running)[-1].outputs[0].finish_reason is FinishReason.LENGTH


async def test_shutting_down_ends_what_still_runs(fake_client):
    async with fake_client() as client:
        running = asyncio.create_task(collect(client.generate("abc", SamplingParams(), request_id="r")))
        await asyncio.sleep(0.05)
        assert not await client.drain(timeout_s=0.05)

    assert (await running)[-1].outputs[0].finish_reason is FinishReason.ABORT
    assert client.health.state is EngineState.DEAD
    await client.shutdown()


async def test_the_prefix_cache_can_be_reset(fake_client):
    async with fake_client() as client:
        assert await client.reset_prefix_cache() is True


async def test_a_started_client_knows_its_model(fake_client):
    async with fake_client() as client:
        assert client.health.state is EngineState.READY
        assert client.model_info.served_names == ("tiny",)
        assert (client.model_info.max_model_len, client.model_info.vocab_size) == (2048, 300)
        assert client.model_info.fingerprint == "fp_fake"


@pytest.mark.parametrize(
    ("start", "error_type", "words"),
    [
        ("checkpoint_error", CheckpointError, "^the fake checkpoint is broken$"),
        ("bug", JaxserveError, "KeyError: 'a bug in the core'"),
        ("kill", JaxserveError, "killed by SIGKILL .* while it started"),
    ],
)
async def test_a_failed_start_is_raised_as_what_it_was(fake_client, start, error_type, words):
    with pytest.raises(JaxserveError, match=words) as raised:
        async with fake_client({"start": start, "unless": "/"}):
            pass

    assert type(raised.value) is error_type


async def test_api_keys_stay_out_of_the_engine_process(fake_client, monkeypatch):
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    async with fake_client(api_key="secret") as client:  # the fake core looks for keys in its config
        assert "secret" not in {*psutil.Process(client.engine_pid).environ().values()}


async def test_progress_of_the_start_is_passed_on(make_config):
    from jaxserve.engine.process_client import ProcessEngineClient

    lines = []
    async with ProcessEngineClient(make_config(), core="tests.engine.fake_core:FakeCore", on_progress=lines.append):
        pass

    assert lines[0].startswith("engine process ")
    assert lines[1:] == ["loading the fake"]


async def test_the_metrics_follow_the_requests(fake_client):
    async with fake_client() as client:
        await collect(client.generate("abc", SamplingParams(max_tokens=5), request_id="r"))
        await wait_for(lambda: b"engine_steps_total" in client.metrics.render())
        text = client.metrics.render().decode()

    labels = 'engine="0",model_name="tiny"'
    assert f"jaxserve:prompt_tokens_total{{{labels}}} 3.0" in text
    assert f"jaxserve:generation_tokens_total{{{labels}}} 5.0" in text
    assert f"jaxserve:time_to_first_token_seconds_count{{{labels}}} 1.0" in text
    assert 'jaxserve:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 1.0' in text
    assert "jaxserve:cache_config_info" in text
    assert f"jaxserve:iteration_tokens_total_count{{{labels}}} 5.0" in text
    assert f"jaxserve:iteration_tokens_total_sum{{{labels}}} 15.0" in text  # the fake's steps have three tokens each


async def wait_for(condition, timeout_s=5.0):
    """Wait until a condition of another process holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.01)


async def test_a_request_aborted_while_its_prompt_is_tokenised_never_runs(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record)}) as client:
        task = asyncio.create_task(
            collect(client.generate("ab" * 1000 + "c" * 2500, SamplingParams(truncate_prompt_tokens=2), request_id="r"))
        )
        await asyncio.sleep(0)
        await client.abort("r")
        [output] = await task

    assert output.outputs[0].finish_reason is FinishReason.ABORT
    assert record.read_text() == "shutdown\n"


async def test_a_missing_tokenizer_ends_the_start_before_the_engine_is_ready(fake_client, tmp_path):
    start_s = time.monotonic()
    with pytest.raises(JaxserveError, match="tokenizer"):
        async with fake_client({"start_s": 60}, tokenizer=str(tmp_path)):
            pass

    assert time.monotonic() - start_s < 10
