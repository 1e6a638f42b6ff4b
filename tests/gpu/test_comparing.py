"""What the checks compare with: errors against tolerances, answers up to their first difference, rooflines by hand."""

import numpy as np
import pytest

from jaxserve.outputs import TokenDelta, TokenLogprobs
from tests.gpu.attention_programs import decode_run, prefill_run
from tests.gpu.correctness import compared as compared_values
from tests.gpu.engine_tokens import compared as compared_answers
from tests.gpu.sizes import FULL


def test_an_error_is_measured_in_what_is_allowed():
    wanted = np.array([1.0, -2.0])
    assert compared_values(np.array([1.0, -2.03], np.float32), wanted, "bfloat16")["of_allowed"] == pytest.approx(
        0.03 / 0.06, rel=1e-4
    )
    assert compared_values(wanted, wanted, "bfloat16") == {"max_error": 0.0, "of_allowed": 0.0}


def test_nan_is_never_right():
    assert compared_values(np.array([np.nan]), np.array([0.0]), "bfloat16")["of_allowed"] == float("inf")


def answer(*token_ids: int, gaps: dict[int, float] | None = None) -> list[TokenDelta]:
    """An answer whose alternatives are the tokens 0 to 9, `gaps` below the chosen one, the last by 2."""
    entries = []
    for token in token_ids:
        below = dict.fromkeys(range(10), 2.0) | (gaps or {}) | {token: 0.0}
        ordered = sorted(below, key=below.__getitem__)
        entries.append(
            TokenLogprobs(
                token_id=token,
                logprob=-1.0,
                rank=1,
                top_token_ids=ordered,
                top_logprobs=[-1.0 - below[other] for other in ordered],
            )
        )
    return [TokenDelta(request_id="r", token_ids=list(token_ids), logprobs=entries)]


def test_equal_answers_are_counted():
    assert compared_answers([answer(1, 2)], [answer(1, 2)]) == {
        "requests": 1,
        "equal_requests": 1,
        "tokens": 2,
        "equal_tokens": 2,
        "of_allowed": 0.0,
    }


def test_answers_may_part_where_the_baseline_nearly_chose_the_other_token():
    result = compared_answers([answer(1, 7, 3)], [answer(1, 2, 5, gaps={7: 0.1})])
    assert (result["equal_requests"], result["equal_tokens"]) == (0, 1)
    assert result["of_allowed"] == pytest.approx(0.1 / (0.1 * 2.0))  # what comes after the difference is not compared


def test_answers_that_part_elsewhere_are_wrong():
    assert compared_answers([answer(1, 7)], [answer(1, 2, gaps={7: 1.0})])["of_allowed"] > 1
    assert compared_answers([answer(1, 99)], [answer(1, 2)])["of_allowed"] == float("inf")


def test_bytes_and_operations_of_the_model_are_counted_by_hand():
    decode = decode_run(FULL, 256, has_prefill=False)
    assert decode.kv_bytes == 256 * 1024 * 2 * 8 * 128 * 2  # 1 GiB
    assert decode.io_bytes - decode.kv_bytes == 2 * 256 * 32 * 128 * 2
    prefill = prefill_run(FULL, 8192)
    assert prefill.flops == 4 * 32 * 128 * (8192 * 8193 // 2)
    assert prefill_run(FULL, 1024).rows == 8


@pytest.mark.parametrize("batch", FULL.batches)
def test_no_keys_are_read_again_while_a_cache_may_hold_them(batch):
    run = decode_run(FULL, batch, has_prefill=False)
    assert run.sets * run.kv_bytes >= FULL.cold_bytes
    assert run.length >= run.sets
    batches = run.batches()
    first = {int(block) for block in np.asarray(batches[0].block_tables).ravel()}
    assert all(first.isdisjoint(map(int, np.asarray(batch.block_tables).ravel())) for batch in batches[1:])
