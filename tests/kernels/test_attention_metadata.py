"""build_metadata: the host's plan of a batch and its bounds."""

import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionGeometry, build_metadata
from pallas_kernels.paged_attention.xla.plan import QUERY_TILE
from tests.kernels.line_count import lines_run

TABLES = np.arange(1, 33, dtype=np.int32).reshape(4, 8)


def geometry(block_size):
    return AttentionGeometry(q_heads=4, kv_heads=2, head_dim=64, block_size=block_size, dtype="float32")


def build(query_lens, kv_lens, tables=None, **overrides):
    bucket = {"geometry": geometry(64), "num_tokens": 256, "num_rows": 4} | overrides
    return build_metadata(query_lens, kv_lens, TABLES[: len(query_lens)] if tables is None else tables, **bucket)


def test_decode_rows_come_longest_first_and_prefills_are_cut_into_tiles():
    metadata = build([1, QUERY_TILE + 6, 1, 2], [30, 100, 50, 2])
    assert metadata.plan.decode_rows[:2].tolist() == [2, 0]
    assert metadata.plan.decode_lens[:3].tolist() == [50, 30, 0]
    assert metadata.plan.decode_tokens[:2].tolist() == [QUERY_TILE + 7, 0]
    assert (metadata.plan.num_decodes, metadata.plan.num_tiles) == (2, 3)
    assert metadata.plan.tile_rows[:3].tolist() == [1, 1, 3]
    assert metadata.plan.tile_tokens[:3].tolist() == [1, 1 + QUERY_TILE, QUERY_TILE + 8]
    assert metadata.plan.tile_positions[:3].tolist() == [30, 30 + QUERY_TILE, 0]
    assert metadata.plan.tile_lens[:3].tolist() == [QUERY_TILE, 6, 2]
    assert metadata.query_starts.tolist() == [0, 1, QUERY_TILE + 7, QUERY_TILE + 8, QUERY_TILE + 10]


def test_each_token_reads_its_own_result_and_padding_reads_the_zeros():
    metadata = build([3, 1], [3, 5], num_tokens=70)
    zeros = len(metadata.plan.decode_rows)
    assert metadata.plan.output_rows.tolist() == [zeros + 1, zeros + 2, zeros + 3, 0, *[zeros] * 66]


def test_every_token_of_a_small_bucket_is_a_decode():
    metadata = build([3, 1], [5, 4], num_tokens=8)
    assert metadata.plan.tile_rows.shape == (0,)
    assert (metadata.plan.num_decodes, metadata.plan.num_tiles) == (4, 0)
    assert metadata.plan.decode_lens.tolist() == [5, 4, 4, 3, 0, 0, 0, 0]
    assert metadata.plan.decode_rows[:4].tolist() == [0, 0, 1, 0]
    assert metadata.plan.decode_tokens[:4].tolist() == [2, 1, 3, 0]
    assert metadata.plan.output_rows.tolist() == [3, 1, 0, 2, *[8] * 4]


def test_every_batch_that_fits_a_bucket_fits_its_tiles():
    rng = np.random.default_rng(0)
    for _ in range(200):
        num_rows = int(rng.integers(1, 9))
        query_lens = 1 + rng.multinomial(int(rng.integers(0, 200)), np.ones(num_rows) / num_rows)
        tables = np.ones((num_rows, 8), np.int32)
        metadata = build(query_lens, query_lens, tables, num_tokens=int(query_lens.sum()), num_rows=num_rows)
        assert metadata.plan.tile_lens.sum() + metadata.plan.num_decodes == query_lens.sum()


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "overrides", "message"),
    [
        ([1, 1], [1], {}, "agree on the rows"),
        ([0], [1], {}, "1 <= query_len"),
        ([2], [1], {}, "query_len <= kv_len"),
        ([1], [513], {}, "more than the 8 blocks of 64"),
        ([1] * 4, [1] * 4, {"num_rows": 3}, "do not fit the bucket"),
        ([9], [9], {"num_tokens": 8}, "do not fit the bucket"),
        ([2], [2], {"has_prefill": False}, "has_prefill=True"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(query_lens, kv_lens, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(query_lens, kv_lens, **overrides)


def test_256_rows_take_no_more_python_than_16() -> None:
    def count(num_rows: int) -> int:
        kv_lens = np.random.default_rng(0).integers(1, 8192, num_rows)
        tables = np.ones((num_rows, 512), np.int32)
        bucket = {"geometry": geometry(16), "num_tokens": 256, "num_rows": 256}
        return lines_run(lambda: build_metadata(np.ones(num_rows, np.int32), kv_lens, tables, **bucket))

    assert count(256) == count(16)


def test_common_chunks_are_whole_and_leave_each_row_a_position_of_its_own() -> None:
    tables = np.zeros((4, 24), np.int32)
    tables[:, :20] = np.arange(1, 21)
    tables[3, 19] = 99

    def common(kv_lens: list[int], rows: list[int]) -> int:
        ones = np.ones(len(rows), np.int32)
        metadata = build_metadata(ones, kv_lens, tables[rows], geometry=geometry(16), num_tokens=8, num_rows=8)
        return int(metadata.plan.num_common_chunks)

    assert common([300, 310, 320], [0, 1, 2]) == 2
    assert common([257, 310], [0, 1]) == 2
    assert common([256, 310], [0, 1]) == 1
    assert common([320, 320], [0, 3]) == 2
    assert common([320], [0]) == 0
    tables[2, 0] = 50
    assert common([300, 310, 320], [0, 1, 2]) == 0


def test_common_chunks_are_those_that_the_tokens_of_all_rows_see_whole() -> None:
    def common(rows: list[tuple[int, int]], tables: np.ndarray) -> int:
        query_lens, kv_lens = [new for _, new in rows], [computed + new for computed, new in rows]
        return int(build(query_lens, kv_lens, tables, geometry=geometry(16)).plan.num_common_chunks)

    tables = np.tile(np.arange(1, 41, dtype=np.int32), (2, 1))
    tables[1, 20:] += 100
    assert common([(300, 34), (310, 1)], tables) == 2
    assert common([(255, 34), (310, 1)], tables) == 1, "the first token does not see the second chunk whole"
    assert common([(0, 34), (310, 1)], tables) == 0
    assert common([(256, 200)], tables[:1]) == 2, "a long prompt walks what it has computed once for all its tiles"
    assert common([(256, 1)], tables[:1]) == 0
