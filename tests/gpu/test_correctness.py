"""Which cases the check of kernels runs, and that kernels which refuse them are not passed over."""

from dataclasses import replace

import pytest

from pallas_kernels.isolation import Outcome
from pallas_kernels.paged_attention import choose_implementation
from pallas_kernels.paged_attention.cases import CASES, SUPPORTED, Case
from tests.gpu.cases import attention_cases
from tests.gpu.correctness import prepare, works
from tests.gpu.judging import is_sound, lines
from tests.gpu.sizes import FULL
from tests.kernels.test_gpu_decode import gpu_of


def is_refused(case: Case) -> bool:
    try:
        choose_implementation("mosaic_gpu", case.geometry, device=gpu_of("9.0"))
    except NotImplementedError:
        return True
    return False


def test_gpu_kernels_take_all_cases_but_those_that_are_named():
    checked = attention_cases(FULL)
    assert [name for name, case in checked.items() if is_refused(case)] == []
    assert checked.keys() >= {case.name for case in SUPPORTED if "mosaic_gpu" not in case.refused_by}
    refused = {case.name for case in CASES if is_refused(replace(case, dtype="bfloat16"))}
    assert refused == {case.name for case in CASES if "mosaic_gpu" in case.refused_by}
    assert refused.isdisjoint(checked)
    assert attention_cases(replace(FULL, implementation="xla")).keys() >= refused


def test_kernels_that_refuse_every_case_make_no_sound_run():
    """As with a CUDA whose compiler is broken; here, since there is no GPU."""
    names = [name for name in works(FULL) if name.startswith("paged_attention/")]
    run = prepare(FULL, names)
    outcomes = {}
    for name in names:
        with pytest.raises(NotImplementedError) as refusal:
            run(name)
        outcomes[name] = Outcome(name=name, error=str(refusal.value))
    results = {"correctness": outcomes}
    judged, *failures = lines(results, FULL)
    assert (judged.measured, judged.verdict) == (f"0 of {len(names)} cases right", "missed")
    assert {failure.measured for failure in failures} == {
        "failed: 'mosaic_gpu' does not run on cpu; here are native_cpu, xla"
    }
    assert not is_sound(results)
