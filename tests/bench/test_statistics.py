"""The arithmetic of benchmarks, against NumPy and by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.report import Report, shown
from jaxserve.bench.serving import parse_concurrencies
from jaxserve.bench.statistics import RequestTimes, percentile, summarize
from jaxserve.bench.workload import LengthRange, Workload
from jaxserve.errors import ConfigError


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_a_requests_times_are_told_from_its_arrivals():
    times = RequestTimes(sent_s=10.0, num_prompt_tokens=5, arrivals_s=[10.5, 10.7, 11.1], num_output_tokens=4)
    assert times.ttft_s == pytest.approx(0.5)
    assert times.e2e_s == pytest.approx(1.1)
    assert times.itl_s == pytest.approx([0.2, 0.4])
    assert times.tpot_s == pytest.approx(0.2)  # 0.6 s for the three tokens after the first


def test_a_single_token_has_no_time_per_token():
    times = RequestTimes(sent_s=0.0, num_prompt_tokens=1, arrivals_s=[1.0], num_output_tokens=1)
    assert times.tpot_s is None
    assert "tpot_ms_p50" not in summarize([times], 1.0)


def test_a_summary_counts_tokens_and_requests_a_second():
    requests = [
        RequestTimes(sent_s=0.0, num_prompt_tokens=10, arrivals_s=[0.1, 0.3], num_output_tokens=2),
        RequestTimes(sent_s=0.0, num_prompt_tokens=30, arrivals_s=[0.2, 0.3, 0.5], num_output_tokens=3),
    ]
    summary = summarize(requests, duration_s=0.5)
    assert (summary["requests"], summary["prompt_tokens"], summary["output_tokens"]) == (2, 40, 5)
    assert summary["output_tokens_per_s"] == pytest.approx(10.0)
    assert summary["total_tokens_per_s"] == pytest.approx(90.0)
    assert summary["requests_per_s"] == pytest.approx(4.0)
    assert summary["ttft_ms_p50"] == pytest.approx(150.0)
    assert summary["itl_ms_p99"] == pytest.approx(200.0)


def test_a_workload_is_the_same_for_the_same_seed_and_shares_its_prefix():
    workload = Workload(
        num_prompts=20, input_len=LengthRange(16, 64), output_len=LengthRange(4, 8), shared_prefix_len=10, seed=3
    )
    requests = workload.requests(1000)
    assert requests == workload.requests(1000)
    assert len({tuple(request.prompt_token_ids[:10]) for request in requests}) == 1
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 20
    assert all(16 <= len(request.prompt_token_ids) <= 64 for request in requests)
    assert all(4 <= request.output_len <= 8 for request in requests)
    assert all(0 <= token < 1000 for request in requests for token in request.prompt_token_ids)


@pytest.mark.parametrize("text", ["", "0", "a", "5:3", "1:2:3", "-4"])
def test_a_wrong_length_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"--input-len must be a number of tokens such as 128, or a range"):
        LengthRange.parse(text, "--input-len")


@pytest.mark.parametrize("text", ["", "0", "1,,2", "some"])
def test_a_wrong_concurrency_is_refused(text):
    with pytest.raises(ConfigError, match="--concurrency must be numbers"):
        parse_concurrencies(text, 10)


def test_numbers_are_shown_with_three_digits():
    assert [shown(value) for value in (12345.6, 123.4, 1.234, 0.001234, 0)] == ["12346", "123", "1.23", "0.00123", "0"]


def test_a_report_is_a_table_and_a_json_file_with_the_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    times = RequestTimes(sent_s=0.0, num_prompt_tokens=1, arrivals_s=[0.1, 0.3], num_output_tokens=2)
    report = Report(benchmark="b", settings={"x": 1}, results=[{"prompts": 1} | summarize([times], 0.5)])
    report.finish(["prompts"], str(tmp_path / "out.json"))
    table = capsys.readouterr().out
    assert "…" not in table  # nothing is cut short on a narrow terminal
    assert "TTFT ms" in table
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"cpu", "cores", "jax", "jaxlib", "date"} <= written["machine"].keys()
    assert written["results"][0]["output_tokens_per_s"] == 4.0


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    report = Report(benchmark="b", settings={}, results=[])
    with pytest.raises(ConfigError, match="cannot write --json"):
        report.write_json(str(tmp_path / "no" / "out.json"))
