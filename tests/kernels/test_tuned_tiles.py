"""Tuned tiles: read for the device at hand, used by plans, refused with a clear error; and those that are committed."""

import dataclasses
import json

import jax
import pytest

from pallas_kernels import tuned_tiles as store
from pallas_kernels.autotune import OPS
from pallas_kernels.kv_write.tiles import WriteTiles, checked_write_tiles, write_tiles
from pallas_kernels.paged_attention import AttentionGeometry, metadata_shapes
from pallas_kernels.paged_attention.cases import Case, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu.tiles import (
    HEAD_DIMS,
    DecodeTiles,
    GpuTiles,
    PrefillTiles,
    checked_decode_tiles,
    checked_prefill_tiles,
    heuristic_decode_tiles,
    heuristic_prefill_tiles,
)
from pallas_kernels.paged_attention.mosaic_tpu.tiles import TpuTiles, checked_tiles
from pallas_kernels.tuned_tiles import Entry, TunedFile, TunedTilesError, path_of

GEOMETRY = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
GPU_SIZES = {"head_dim": 128, "block_size": 16, "group": 4}
TPU_SIZES = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16, "dtype": "bfloat16"}


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Writes a file of one entry for the device at hand."""
    monkeypatch.setattr(store, "FOLDER", tmp_path)
    monkeypatch.setattr(store, "device_kind", lambda: "NVIDIA H100 80GB HBM3")

    def write(op: str, sizes: dict, tiles: dict) -> None:
        entry = Entry(sizes=sizes, tiles=tiles, us={"case": 1.0}, heuristic_us={}, skipped={})
        file = TunedFile(op=op, device=store.device_kind(), date="2026-01-01", jax="0.11.2", entries=(entry,))
        file.write(tmp_path)

    return write


def test_without_a_file_tiles_are_heuristic(tuned):
    assert GpuTiles.of(GEOMETRY) == GpuTiles(decode=heuristic_decode_tiles(128), prefill=heuristic_prefill_tiles(128))
    assert write_tiles(2048).tokens == 4


def test_an_entry_of_the_same_sizes_is_taken_and_no_other(tuned):
    best = DecodeTiles(kv_tile=128, stages=2, query_stages=1)
    tuned("paged_decode", GPU_SIZES, dataclasses.asdict(best))
    tuned("paged_prefill", GPU_SIZES, {"block_kv": 64, "stages": 4})
    tuned("kv_write", {"row_bytes": 2048}, {"tokens": 16})
    assert GpuTiles.of(GEOMETRY) == GpuTiles(decode=best, prefill=PrefillTiles(block_kv=64, stages=4))
    other = dataclasses.replace(GEOMETRY, block_size=64)
    assert GpuTiles.of(other).decode == heuristic_decode_tiles(128)
    assert (write_tiles(2048), write_tiles(256)) == (WriteTiles(tokens=16), WriteTiles(tokens=16))
    assert write_tiles(4096) == WriteTiles(tokens=2)


def test_another_device_has_tiles_of_its_own(tuned, monkeypatch):
    tuned("paged_decode", GPU_SIZES, {"kv_tile": 128, "stages": 2, "query_stages": 1})
    monkeypatch.setattr(store, "device_kind", lambda: "NVIDIA H200")
    assert GpuTiles.of(GEOMETRY).decode == heuristic_decode_tiles(128)


def test_a_tpu_is_tuned_likewise(tuned):
    tuned("ragged_prefill", TPU_SIZES, {"query_tile": 64, "kv_tile": 512, "kv_chunk": 256})
    tiles = TpuTiles.of(GEOMETRY)
    assert dataclasses.asdict(tiles.prefill) == {"query_tile": 64, "kv_tile": 512, "kv_chunk": 256}
    assert tiles.decode.query_tile == 1


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_plans_carry_their_tiles_and_compile_anew_for_others(tuned, implementation):
    case = Case(name="a", rows=((0, 5), (40, 1)), q_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", num_tokens=16)
    case = dataclasses.replace(case, has_prefill=True)
    before = make_inputs(case, implementation=implementation).metadata
    tuned("paged_prefill", GPU_SIZES, {"block_kv": 64, "stages": 4})
    tuned("ragged_prefill", TPU_SIZES, {"query_tile": 16, "kv_tile": 256, "kv_chunk": 128})
    store._entries.cache_clear()  # a process reads a file once
    after = make_inputs(case, implementation=implementation).metadata
    announced = metadata_shapes(
        geometry=case.geometry,
        implementation=implementation,
        num_tokens=16,
        num_rows=4,
        blocks_per_seq=after.block_tables.shape[1],
    )

    assert jax.tree.structure(after) == jax.tree.structure(announced) != jax.tree.structure(before)


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ({"kv_tile": 32, "stages": 4}, "kv_tile must be 64 or 128"),
        ({"kv_tile": 64, "stages": 9}, "bytes of shared memory, there are 232448"),
        ({"kv_tile": 64, "depth": 4}, "depth"),
        ({"kv_tile": 64}, "stages"),
    ],
)
def test_an_illegal_tile_is_refused_with_its_file_its_entry_and_the_way_out(tuned, tiles, said):
    tuned("paged_decode", GPU_SIZES, tiles)
    with pytest.raises(TunedTilesError, match=said) as refusal:
        GpuTiles.of(GEOMETRY)
    assert "nvidia-h100-80gb-hbm3/paged_decode.json" in str(refusal.value)
    assert "'head_dim': 128" in str(refusal.value)
    assert "python -m pallas_kernels.autotune paged_decode" in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [{"sizes": {}}]}'])
def test_a_file_that_is_none_of_ours_is_refused(tuned, tmp_path, text):
    path = path_of("kv_write", "NVIDIA H100 80GB HBM3", tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(TunedTilesError, match="not a file of tuned tiles"):
        write_tiles(2048)


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heuristic_tiles_are_legal(head_dim, block_size):
    geometry = dataclasses.replace(GEOMETRY, head_dim=head_dim, block_size=block_size)
    checked_decode_tiles(geometry, **dataclasses.asdict(heuristic_decode_tiles(head_dim)))
    checked_prefill_tiles(geometry, **dataclasses.asdict(heuristic_prefill_tiles(head_dim)))


def test_tiles_that_cut_blocks_are_illegal():
    geometry = dataclasses.replace(GEOMETRY, block_size=192)
    checked_decode_tiles(geometry, kv_tile=64, stages=2)
    with pytest.raises(ValueError, match="whole blocks of 192"):
        checked_decode_tiles(geometry, kv_tile=128, stages=2)
    with pytest.raises(ValueError, match="whole blocks of 16"):
        checked_tiles(GEOMETRY, is_decode=True, query_tile=1, kv_tile=136, kv_chunk=136)
    with pytest.raises(ValueError, match="query_tile must be a power of two"):
        checked_tiles(GEOMETRY, is_decode=False, query_tile=24, kv_tile=256, kv_chunk=128)
    with pytest.raises(ValueError, match="VMEM"):
        checked_tiles(GEOMETRY, is_decode=True, query_tile=1, kv_tile=1 << 15, kv_chunk=128)
    with pytest.raises(ValueError, match="overflow"):
        checked_write_tiles(8192, tokens=32)


def test_the_files_of_this_package_are_those_of_ops_and_hold_what_was_measured():
    for path in store.FOLDER.glob("*/*.json"):
        record = json.loads(path.read_text())
        assert path.stem == record["op"] and record["op"] in OPS
        assert path == path_of(record["op"], record["device"], store.FOLDER)
        assert all(entry["us"] for entry in record["entries"])
