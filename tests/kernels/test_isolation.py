"""Work in a child process: what fails, dies or hangs is named, and the rest is done."""

import sys

import pytest

from pallas_kernels.isolation import Outcome, run_isolated

CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from pallas_kernels.isolation import serve

def run(name):
    print("noise of a library")
    if name.startswith("raises"):
        raise ValueError("wrong " * 400 + name)
    if name == "dies":
        sys.stderr.write("CUDA_ERROR_ILLEGAL_ADDRESS\\n")
        os._exit(134)
    if name == "hangs":
        time.sleep(60)
    return {{"name": name, "process": os.getpid()}}

serve(lambda names: run, is_usable=lambda: {is_usable})
"""


def run(tmp_path, names: list[str], *, is_usable: bool = True, limit_s: float = 30.0) -> list[Outcome]:
    from tests.test_architecture import ROOT

    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(ROOT), is_usable=is_usable))
    told: list[Outcome] = []
    outcomes = run_isolated(
        [sys.executable, str(script)], names, silence_s=3.0, limit_s=limit_s, on_outcome=told.append
    )
    assert told == outcomes
    assert [outcome.name for outcome in outcomes] == names
    return outcomes


def test_works_share_a_process_and_errors_do_not_end_it(tmp_path):
    first, failed, last = run(tmp_path, ["first", "raises", "last"])
    assert first.value["process"] == last.value["process"]
    assert failed.error is not None and failed.error.startswith("ValueError: wrong") and len(failed.error) < 700


def test_after_an_error_that_spoils_the_process_another_goes_on(tmp_path):
    first, failed, last = run(tmp_path, ["first", "raises", "last"], is_usable=False)
    assert failed.error is not None
    assert first.value["process"] != last.value["process"]


@pytest.mark.parametrize(("work", "said"), [("dies", "status 134: CUDA_ERROR_ILLEGAL_ADDRESS"), ("hangs", "no answer")])
def test_a_work_that_ends_or_stops_its_process_is_named_and_the_others_are_done(tmp_path, work, said):
    first, lost, last = run(tmp_path, ["first", work, "last"])
    assert lost.error is not None and said in lost.error
    assert first.value["name"] == "first" and last.value["name"] == "last"


def test_what_the_time_does_not_reach_is_named(tmp_path):
    outcomes = run(tmp_path, ["first", "hangs", "last"], limit_s=2.0)
    assert outcomes[0].error is None
    assert "no answer" in str(outcomes[1].error)
    assert outcomes[2].error == "not reached in 2 s"


def test_a_child_that_cannot_start_is_not_started_again_for_each_work():
    command = [sys.executable, "-c", "import no_such_module"]
    outcomes = run_isolated(command, ["a", "b"], silence_s=10.0, limit_s=20.0)
    assert [("No module named 'no_such_module'" in str(outcome.error)) for outcome in outcomes] == [True, True]
