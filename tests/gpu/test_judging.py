"""How figures become a table: marks met and missed, failures named, nothing invented where nothing was measured."""

import dataclasses
import doctest
import json

import pytest

from pallas_kernels.isolation import Outcome
from tests.gpu import report
from tests.gpu.judging import Line, Results, is_sound, lines
from tests.gpu.plan import STAGES, TOTAL_S
from tests.gpu.sizes import FULL, TOY, Sizes
from tests.gpu.transformers_batching import Observed, figures

COPY = 3e12  # bytes a second


def stage(**values: object) -> dict[str, Outcome]:
    """Works by name, underscores for slashes: a dict is a value, a string an error."""
    return {
        (key := name.replace("_", "/")): Outcome(name=key, error=value)
        if isinstance(value, str)
        else Outcome(name=key, value=value)
        for name, value in values.items()
    }


def line(results: Results, check: str, sizes: Sizes = FULL) -> Line:
    (found,) = [line for line in lines(results, sizes) if line.check.startswith(check)]
    return found


def decode(batch: int, us: float, share: float) -> dict[str, float]:
    return {"batch": batch, "us": us, "min_us": us, "single_us": us, "bytes_per_s": share * COPY}


@pytest.mark.parametrize(("share", "verdict"), [(0.81, "met"), (0.79, "missed")])
def test_decode_attention_of_many_rows_is_held_to_the_copy_rate(share, verdict):
    results = {"decode_attention": stage(copy={"bytes_per_s": COPY}, decodes_32=decode(32, 50.0, share))}
    judged = line(results, "decode attention, batch 32")
    assert (judged.verdict, judged.mark) == (verdict, ">= 80% of copy")
    assert f"{share:.0%} of the copy rate" in judged.beside


@pytest.mark.parametrize(("us", "verdict"), [(14.9, "met"), (15.1, "missed")])
def test_decode_attention_of_one_row_is_held_to_a_time(us, verdict):
    results = {"decode_attention": stage(copy={"bytes_per_s": COPY}, decodes_1=decode(1, us, 0.1))}
    assert line(results, "decode attention, batch 1,").verdict == verdict


def test_a_share_of_an_unknown_copy_rate_is_not_measured():
    results = {"decode_attention": stage(copy="RuntimeError: no memory", decodes_64=decode(64, 50.0, 0.9))}
    assert line(results, "decode attention, batch 64").verdict == "not measured"
    assert line(results, "decode_attention, copy").measured == "failed: RuntimeError: no memory"


@pytest.mark.parametrize(("flops", "verdict"), [(510e12, "met"), (490e12, "missed")])
def test_prefill_is_held_to_its_rate_at_the_long_prompt_alone(flops, verdict):
    value = {"us": 1.0, "min_us": 1.0, "flops_per_s": flops}
    works = stage(product={"flops_per_s": 700e12}, prompts_8192=value, prompts_1024=value, cudnn_8192=value)
    judged = line({"prefill_attention": works}, "prefill attention, 1 x 8192")
    assert judged.verdict == verdict
    assert f"cuDNN {flops / 1e12:.0f} TFLOP/s" in judged.beside
    assert line({"prefill_attention": works}, "prefill attention, 8 x 1024").mark == ""


@pytest.mark.parametrize(("ms", "verdict"), [(6.2, "met"), (6.3, "missed")])
def test_a_decode_step_is_held_to_its_roofline(ms, verdict):
    value = {"ms": ms, "min_ms": ms, "single_ms": ms, "read_bytes": 15e9, "tokens_per_s": 1e3 / ms}  # 5 ms at 3 TB/s
    results = {"decode_step": stage(copy={"bytes_per_s": COPY}, **{"1": value})}
    judged = line(results, "decode step of 32 layers, batch 1,")
    assert judged.verdict == verdict and "roofline 5.00 ms" in judged.beside


@pytest.mark.parametrize(
    ("theirs", "started", "verdict"),
    [(900.0, 64, "met"), (1100.0, 64, "missed"), (900.0, 63, "not measured")],  # not all prompts: no whole run
)
def test_throughput_is_held_to_a_multiple_of_transformers(theirs, started, verdict):
    peer = {"output_tokens_per_s": theirs, "decoding_tokens_per_s": 2000.0, "decoding_s": 25.0, "started": started}
    peer |= {"attention": "sdpa", "requests": 64}
    results = {
        "throughput": stage(jaxserve={"output_tokens_per_s": 10_000.0}),
        "transformers_batching": stage(transformers=peer),
    }
    judged = line(results, "bench throughput")
    assert judged.verdict == verdict
    assert judged.beside.endswith(f"{10_000 / theirs:.1f} times; 5.0 times its decoding alone")


def test_what_a_run_of_transformers_would_give_is_reckoned_from_its_prompts_and_some_decoding():
    observed = Observed(started=64, prompt_tokens=64, prompt_s=10.0, tokens=500, decoding_s=25.0)
    reckoned = figures(observed, 1064)  # 10 s for the first 64 tokens, then 20 tokens a second: 50 s for the other 1000
    assert reckoned["output_tokens_per_s"] == pytest.approx(1064 / 60)
    assert reckoned["decoding_tokens_per_s"] == 20.0


def test_without_a_peer_the_throughput_stands_alone_and_the_run_is_sound():
    results = {
        "throughput": stage(jaxserve={"output_tokens_per_s": 10_000.0}),
        "transformers_batching": stage(transformers="ModuleNotFoundError: No module named 'torch'"),
        "decode_attention": stage(cudnn_1="RuntimeError: unsupported"),
    }
    assert line(results, "bench throughput").verdict == "not measured"
    assert line(results, "transformers_batching").measured.startswith("missing: ModuleNotFoundError")
    assert is_sound(results)


def test_a_wrong_kernel_is_named_and_the_run_is_not_sound():
    right, wrong = {"max_error": 0.01, "of_allowed": 0.5}, {"max_error": float("inf"), "of_allowed": float("inf")}
    works = stage(kv__a=right) | {
        name: Outcome(name=name, value=value) for name, value in (("paged/a", right), ("paged/b", wrong))
    }
    results = {"correctness": works}
    judged = line(results, "paged (mosaic_gpu)")
    assert judged.measured == "1 of 2 cases right; WRONG: b"
    assert judged.verdict == "missed"
    assert not is_sound(results)


def test_an_error_that_is_not_a_number_is_not_right():
    results = {"correctness": stage(paged_a={"max_error": float("nan"), "of_allowed": float("nan")})}
    assert line(results, "paged (mosaic_gpu)").verdict == "missed"
    assert not is_sound(results)


def test_a_kernel_that_hung_is_not_right():
    results = {"correctness": {"paged/a": Outcome(name="paged/a", error="no answer after 50 s")}}
    assert line(results, "paged (mosaic_gpu)").verdict == "missed"
    assert not is_sound(results)


@pytest.mark.parametrize(("of_allowed", "verdict"), [(0.0, "met"), (0.7, "met"), (1.5, "missed")])
def test_greedy_tokens_may_part_at_ties_alone(of_allowed, verdict):
    value = {
        "layers": 3,
        "requests": 2,
        "equal_requests": 1,
        "tokens": 20,
        "equal_tokens": 15,
        "of_allowed": of_allowed,
    }
    results = {"engine_tokens": stage(tiny=value)}
    assert line(results, "greedy tokens, tiny").verdict == verdict
    assert is_sound(results) == (verdict == "met")


@pytest.mark.parametrize(("held", "verdict"), [(900, "met"), (720, "met"), (719, "missed"), (0, "missed")])
def test_most_drafts_of_a_model_for_itself_must_hold(held, verdict):
    value = {"layers": 3, "requests": 2, "equal_requests": 2, "tokens": 20, "equal_tokens": 20, "of_allowed": 0.0}
    results = {"engine_tokens": stage(tiny=value, drafting=value | {"drafts": 900, "held": held})}
    judged = line(results, "greedy tokens, drafting")
    assert (judged.verdict, judged.mark) == (verdict, "differences begin at ties, >= 80% of drafts held")
    assert f"{held} of 900 drafts held" in judged.measured
    assert "drafts" not in (alone := line(results, "greedy tokens, tiny")).measured + alone.mark
    assert is_sound(results) == (verdict == "met")


def test_the_shares_are_the_whole_time():
    assert sum(stage.share_s for stage in STAGES.values()) == TOTAL_S


def test_the_peer_has_time_to_start_and_to_decode():
    start_s = 20.0  # with its prompts and CUDA graphs: docs/gpu-check.md
    assert STAGES["transformers_batching"].share_s >= start_s + FULL.peer_s


def run_of(results: Results, sizes: Sizes = FULL) -> report.Run:
    day = "2026-01-01"
    stages = {name: report.StageRun(date=day, seconds=1.0, works=dict(works)) for name, works in results.items()}
    return report.Run(sizes=sizes, date=day, command="check", seconds=1.0, stages=stages)


def test_a_run_is_written_as_json_and_as_a_table(tmp_path):
    device = {"kind": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"}, "cuda_runtime": 13000}
    wrong = Outcome(name="paged/b", value={"max_error": float("nan"), "of_allowed": float("inf")}, seconds=1.0)
    results = {"device": stage(device=device), "correctness": {"paged/b": wrong}}
    report.write(run_of(results), tmp_path)
    record = json.loads((tmp_path / "gpu-check.json").read_text())
    assert record["device"] == device
    assert record["stages"]["correctness"]["works"]["paged/b"]["value"] == {"max_error": "nan", "of_allowed": "inf"}
    page = (tmp_path / "gpu-check.md").read_text()
    assert "# gpu-check on NVIDIA H100 80GB HBM3" in page and "jax 0.11.2" in page and "WRONG: b" in page
    assert "Marks: 1 missed." in page


def test_a_toy_run_has_no_verdicts():
    results = {"decode_attention": stage(copy={"bytes_per_s": COPY}, decodes_1=decode(1, 1.0, 0.9))}
    assert {line.verdict for line in run_of(results, TOY).table} == {""}
    assert {line.verdict for line in run_of(results, dataclasses.replace(TOY, name="full")).table} != {""}


def test_errors_do_not_break_the_table():
    assert report.table([Line(check="a|b", measured="two\nlines")]).splitlines()[-1] == "| a/b | two lines |  |  |  |"


def test_the_examples_hold():
    results = doctest.testmod(report)
    assert results.attempted and not results.failed
