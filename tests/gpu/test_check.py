"""The command itself, on a CPU at toy sizes: every stage runs in its own process, and the run is written."""

import importlib.util
import json
import sys

import pytest

from tests.gpu.check import Check, main
from tests.gpu.judging import is_sound
from tests.gpu.plan import STAGES, Stage
from tests.gpu.report import earlier_stages
from tests.gpu.sizes import QUICK, TOY

PEERS = ["torch_attention", "transformers_batching"]  # half a minute for PyTorch and transformers to start
OURS = [name for name in STAGES if name not in PEERS]


def run(monkeypatch, out, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["check"])
    status = main([*arguments, "--out", str(out)])
    return status, json.loads((out / "gpu-check.json").read_text())


@pytest.mark.slow
def test_every_stage_of_ours_runs_at_toy_sizes(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in the stages' processes
    status, record = run(monkeypatch, tmp_path, "--toy", "--stages", ",".join(OURS))
    assert status == 0
    assert list(record["stages"]) == OURS
    works = [work for stage in record["stages"].values() for work in stage["works"].values()]
    assert [work["error"] for work in works] == [None] * len(works)
    page = (tmp_path / "gpu-check.md").read_text()
    for check_name in ("kv_write", "greedy tokens, 8b-shaped", "decode attention", "prefill", "decode step", "bench"):
        assert check_name in page


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_stands_beside_at_toy_sizes(monkeypatch, tmp_path):
    status, record = run(monkeypatch, tmp_path, "--toy", "--stages", "torch_attention")
    assert status == 0
    assert list(record["stages"]) == ["device", "torch_attention"]
    assert all(work["value"]["us"] > 0 for work in record["stages"]["torch_attention"]["works"].values())


def test_a_stage_that_cannot_start_is_named_and_the_run_goes_on(monkeypatch, tmp_path):
    broken = Stage(name="no_such_stage", title="broken", share_s=10, silence_s=10)
    monkeypatch.setitem(STAGES, broken.name, broken)
    run = Check(TOY, [STAGES["device"], broken, STAGES["prefill_attention"]], tmp_path)
    run.all_stages()
    assert "KeyError: 'no_such_stage'" in str(run.results[broken.name]["import"].error)
    assert run.results["prefill_attention"]["product"].error is None
    assert not is_sound(run.results)


def test_stages_of_an_earlier_run_are_kept_with_their_date(monkeypatch, tmp_path):
    first, second = (Check(TOY, [STAGES["device"]], tmp_path, keep=True) for _ in range(2))
    first._date, second._date = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    first.stages = [STAGES["device"], STAGES["prefill_attention"]]
    for check in (first, second):
        check.all_stages()
    stages = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
    assert {name: stage["date"][:10] for name, stage in stages.items()} == {
        "device": "2026-01-02",
        "prefill_attention": "2026-01-01",
    }
    assert stages["prefill_attention"]["works"]["product"]["value"]["flops_per_s"] > 0
    assert "Kept from earlier runs: prefill_attention of 2026-01-01" in (tmp_path / "gpu-check.md").read_text()


def test_nothing_is_kept_of_a_run_of_other_sizes(tmp_path):
    Check(TOY, [STAGES["device"]], tmp_path).all_stages()
    with pytest.raises(ValueError, match="other sizes"):
        earlier_stages(tmp_path, QUICK)


def test_without_a_gpu_the_check_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["--out", str(tmp_path), "--stages", "correctness"]) == 1
    said = capsys.readouterr().out
    assert "JAX runs on 'cpu' here" in said
    assert "correctness" not in json.loads((tmp_path / "gpu-check.json").read_text())["stages"]


def test_a_stage_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--stages", "decode"])
    assert "no such stage: decode" in capsys.readouterr().err
