"""Autotune: the sweep's choice, what it skips, and one sweep of each kernel in its interpreter."""

import json
from functools import partial

import pytest

from pallas_kernels import tunable
from pallas_kernels.autotune import OPS, best, main, problems_of, tuned_file
from pallas_kernels.isolation import Outcome
from pallas_kernels.paged_attention.mosaic_gpu import attention
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import decode_sizes
from pallas_kernels.tunable import Problem, candidates
from tests.quick_compiles import QUICK_COMPILES

pytest_plugins = ("tests.kernels.gpu_interpreter",)

HEURISTIC, FASTER, OTHER = {"tokens": 4}, {"tokens": 8}, {"tokens": 16}
PROBLEM = Problem(
    name="llama", sizes={"row_bytes": 2048}, candidates=(HEURISTIC, FASTER, OTHER), measure=lambda tiles: {}
)


def outcomes(*results: dict[str, float] | str) -> dict[str, Outcome]:
    """Of the problem's candidates in order: microseconds, or an error."""
    found = {}
    for tiles, result in zip(PROBLEM.candidates, results, strict=True):
        name = f"llama {json.dumps(tiles)}"
        value = None if isinstance(result, str) else {"us": result, "device": "NVIDIA H100", "jax": "0.11.2"}
        found[name] = Outcome(name=name, value=value, error=result if isinstance(result, str) else None)
    return found


def test_the_candidate_with_the_least_geometric_mean_wins_and_the_others_are_named():
    entry = best(PROBLEM, outcomes({"a": 10.0, "b": 100.0}, {"a": 6.0, "b": 110.0}, "WrongResultError: off by 0.3"))
    assert entry is not None
    assert (entry.tiles, entry.us, entry.heuristic_us) == (FASTER, {"a": 6.0, "b": 110.0}, {"a": 10.0, "b": 100.0})
    assert entry.skipped == {'{"tokens": 16}': "WrongResultError: off by 0.3"}


def test_a_gain_within_the_noise_changes_nothing():
    entry = best(PROBLEM, outcomes({"a": 10.0}, {"a": 9.9}, {"a": 11.0}))
    assert entry is not None and entry.tiles == HEURISTIC


def test_where_the_heuristic_tiles_fail_another_is_taken():
    entry = best(PROBLEM, outcomes("no answer after 120 s", {"a": 20.0}, {"a": 30.0}))
    assert entry is not None and (entry.tiles, entry.heuristic_us) == (FASTER, {})


def test_a_problem_without_a_candidate_that_works_has_no_entry():
    assert best(PROBLEM, outcomes("x", "y", "z")) is None
    assert tuned_file("kv_write", [PROBLEM], outcomes("x", "y", "z")) is None


def test_a_file_says_where_it_comes_from():
    found = tuned_file("kv_write", [PROBLEM], outcomes({"a": 1.0}, "x", "y"))
    assert found is not None and (found.device, found.jax, len(found.entries)) == ("NVIDIA H100", "0.11.2", 1)


def test_candidates_that_cannot_be_are_left_out():
    def check(a: int, b: int) -> None:
        if a * b > 4:
            raise ValueError("too much")

    assert candidates({"a": 1, "b": 1}, check, {"a": (1, 2, 4), "b": (1, 2)}) == [
        {"a": 1, "b": 1},
        {"a": 1, "b": 2},
        {"a": 2, "b": 1},
        {"a": 2, "b": 2},
        {"a": 4, "b": 1},
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_problems_of_different_sizes_and_several_candidates(op):
    problems = problems_of(op, toy=False)
    assert len({json.dumps(dict(problem.sizes), sort_keys=True) for problem in problems}) == len(problems)
    assert all(len(problem.candidates) > 1 for problem in problems)


@pytest.mark.parametrize("op", ["kv_write", "ragged_decode", "ragged_prefill"])
def test_a_toy_sweep_writes_a_file_that_the_kernels_can_read(op, tmp_path, capsys, monkeypatch):
    for name, value in QUICK_COMPILES.items():  # of the process that measures
        monkeypatch.setenv(name, value)
    assert main([op, "--toy", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "cpu" / f"{op}.json").read_text())
    (entry,) = record["entries"]
    (problem,) = problems_of(op, toy=True)
    assert entry["sizes"] == problem.sizes and entry["tiles"] in [dict(tiles) for tiles in problem.candidates]
    assert entry["skipped"] == {} and all(us > 0 for us in entry["us"].values())


@pytest.mark.usefixtures("compiled_once", "few_reads_at_once")
@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
def test_tiles_of_the_gpus_attention_are_measured_with_its_own_plans(op, monkeypatch):
    monkeypatch.setattr(attention, "decode_sizes", partial(decode_sizes, num_sms=2))  # thread blocks to interpret
    (problem,) = problems_of(op, toy=True)
    assert all(us > 0 for us in problem.measure(problem.candidates[1]).values())


def test_a_candidate_that_gives_wrong_values_is_refused(monkeypatch):
    from pallas_kernels.kv_write import tuning

    (problem,) = tuning.problems("kv_write", toy=True)
    right = tuning.kv_write_reference
    monkeypatch.setattr(tuning, "kv_write_reference", lambda *inputs: tuple(pool + 1 for pool in right(*inputs)))
    with pytest.raises(tunable.WrongResultError, match="not every slot"):
        problem.measure(problem.candidates[0])


def test_a_wrong_attention_is_refused(monkeypatch):
    from pallas_kernels.paged_attention import tuning

    (problem,) = tuning.problems("ragged_decode", toy=True)
    right = tuning.paged_attention_reference
    monkeypatch.setattr(tuning, "paged_attention_reference", lambda *args, **kwargs: right(*args, **kwargs) + 1.0)
    with pytest.raises(tunable.WrongResultError, match="off by"):
        problem.measure(problem.candidates[0])


def test_a_device_that_cannot_run_the_op_is_named(tmp_path, capsys):
    assert main(["kv_write", "--only", "llama_8b", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "kv_write is tuned on a gpu, JAX runs on cpu here" in said and "nothing is written" in said


def test_a_problem_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="fits none of: llama_8b"):
        main(["kv_write", "--only", "gpt"])
