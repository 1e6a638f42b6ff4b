"""The C++ kernels of CPUs beyond their ops' cases: rotation, pools in place, and how the library is compiled."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.kv_write import rotate_and_write
from pallas_kernels.kv_write.reference import rotate_and_write_reference
from pallas_kernels.matmul import to_panels
from pallas_kernels.native import UnavailableError
from pallas_kernels.native.build import SOURCES, UNITS, build, cache_folder
from pallas_kernels.numerics import logical_dtype, pool_dtype, pool_shape, tolerance
from pallas_kernels.paged_attention import (
    AttentionGeometry,
    build_metadata,
    choose_implementation,
    metadata_shapes,
    paged_attention,
)
from tests.kernels.test_pools_stay_in_place import pool_sized_instructions

SLOTS = (95, 16, 40, 0, 0, 96, -1, 17, 33)  # two outside of the pool's six blocks


def projections(dtype: str, *, group: int, head_dim: int):
    rng = np.random.default_rng(2)
    shape = pool_shape(6, 16, 2, head_dim)
    pools = rng.standard_normal((2, *shape)).astype(logical_dtype(pool_dtype(dtype, "cpu")))
    qkv = rng.standard_normal((len(SLOTS), 2, group + 2, head_dim)).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (len(SLOTS), head_dim // 2))
    return qkv, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), *pools


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (8, 24)])
def test_rotation_and_writes_agree_with_the_reference(dtype, group, head_dim):
    qkv, cos, sin, k_pool, v_pool = projections(dtype, group=group, head_dim=head_dim)
    stored = pool_dtype(dtype, "cpu")
    slots = jnp.asarray(SLOTS, jnp.int32)
    q, *pools = rotate_and_write(
        *map(jnp.asarray, (qkv, cos, sin, k_pool.view(stored), v_pool.view(stored))), slots, implementation="native_cpu"
    )
    inside = [token for token, slot in enumerate(SLOTS) if 0 <= slot < 96]
    expected_q, _, _ = rotate_and_write_reference(qkv, cos, sin, k_pool, v_pool, np.zeros(len(SLOTS), int))
    _, *expected = rotate_and_write_reference(
        qkv[inside], cos[inside], sin[inside], k_pool, v_pool, np.asarray(SLOTS)[inside]
    )
    np.testing.assert_allclose(np.asarray(q), expected_q, **tolerance("float32"))
    for pool, wanted in zip(pools, expected, strict=True):
        values = np.asarray(pool).view(wanted.dtype).astype(np.float32)
        np.testing.assert_allclose(values[1:], wanted[1:].astype(np.float32), **tolerance(dtype))
    np.testing.assert_array_equal(np.asarray(pools[1])[1:], expected[1][1:].view(stored))  # values are only rounded


@pytest.mark.usefixtures("fused_as_served")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 16, 128])
def test_a_step_of_three_layers_copies_no_pool(dtype, num_tokens):
    shape = pool_shape(2039, 16, 2, 64)  # a prime, so that no other array has the size of a pool

    def step(qkv, cos, pools, slots, metadata):
        written = []
        for pool in pools:
            q, *pool = rotate_and_write(qkv, cos, cos, *pool, slots, implementation="native_cpu")
            attended = paged_attention(q.reshape(num_tokens, 4, 64), *pool, metadata, scale=0.125)
            qkv = qkv.at[:, :, :2].add(attended.reshape(num_tokens, 2, 2, 64))
            written.append(pool)
        return qkv, written

    pool = jax.ShapeDtypeStruct(shape, pool_dtype(dtype, "cpu"))
    metadata = metadata_shapes(
        geometry=AttentionGeometry(q_heads=4, kv_heads=2, head_dim=64, block_size=16, dtype=dtype),
        implementation="native_cpu",
        num_tokens=num_tokens,
        num_rows=min(num_tokens, 8),
        blocks_per_seq=32,
    )
    operands = (
        jax.ShapeDtypeStruct((num_tokens, 2, 4, 64), jnp.float32),
        jax.ShapeDtypeStruct((num_tokens, 32), jnp.float32),
        [(pool, pool)] * 3,
        jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
        metadata,
    )
    compiled = jax.jit(step, donate_argnums=2).lower(*operands).compile()
    assert pool_sized_instructions(compiled.as_text(), shape) == []  # the custom calls answer with tuples
    pool_bytes = int(np.prod(shape)) * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 6 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_gets_the_same_bits_alone_in_a_batch_and_in_a_prompt(dtype, window):
    geometry = AttentionGeometry(q_heads=3, kv_heads=1, head_dim=64, block_size=16, dtype=dtype)
    rng = np.random.default_rng(3)
    values = rng.standard_normal((2, *pool_shape(40, 16, 1, 64))).astype(logical_dtype(pool_dtype(dtype, "cpu")))
    pools = [jnp.asarray(value.view(pool_dtype(dtype, "cpu"))) for value in values]
    queries = jnp.asarray(rng.standard_normal((32, 3, 64)), jnp.float32)
    table = np.arange(1, 33, dtype=np.int32)[None]

    def attended(num_tokens: list[int], kv_lens: list[int]) -> np.ndarray:
        rows = len(num_tokens)
        metadata = build_metadata(
            num_tokens,
            kv_lens,
            np.repeat(table, rows, axis=0),
            geometry=geometry,
            implementation="native_cpu",
            num_tokens=sum(num_tokens),
            num_rows=rows,
        )
        return np.asarray(
            paged_attention(queries[: sum(num_tokens)], *pools, metadata, scale=0.125, sliding_window=window)
        )

    together = attended([1] * 32, list(range(480, 512)))
    for rows in (1, 2, 5, 31):
        np.testing.assert_array_equal(attended([1] * rows, list(range(480, 480 + rows))), together[:rows])
    for tokens in (7, 32):
        np.testing.assert_array_equal(attended([tokens], [479 + tokens]), together[:tokens])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_share_blocks_get_the_bits_they_have_alone(dtype):
    """Decodes in no order: of two prefixes, some with one chunk of 64 in common, some with several, some with none."""
    geometry = AttentionGeometry(q_heads=4, kv_heads=2, head_dim=64, block_size=16, dtype=dtype)
    rng = np.random.default_rng(5)
    first, second = np.arange(1, 21), np.arange(21, 41)
    kv_lens = [320, 130, 70, 64, 65, 200, 320, 10, 127, 128, 129, 300, 310, 81, 320, 320, 64, 64]
    num_shared = [20, 8, 4, 4, 4, 0, 12, 0, 7, 8, 8, 12, 16, 5, 20, 19, 4, 3]  # leading blocks that are the prefix's
    tables, own = np.zeros((len(kv_lens), 20), np.int32), 41
    for row, (kv_len, shared) in enumerate(zip(kv_lens, num_shared, strict=True)):
        blocks = -(-kv_len // 16)
        tables[row, :shared] = (first if row % 3 else second)[:shared]
        tables[row, shared:blocks] = np.arange(own, own + blocks - shared)
        own += blocks - shared
    values = rng.standard_normal((2, *pool_shape(own, 16, 2, 64))).astype(logical_dtype(pool_dtype(dtype, "cpu")))
    pools = [jnp.asarray(value.view(pool_dtype(dtype, "cpu"))) for value in values]
    queries = jnp.asarray(rng.standard_normal((len(kv_lens), 4, 64)), jnp.float32)

    def attended(rows: list[int]) -> np.ndarray:
        metadata = build_metadata(
            [1] * len(rows),
            [kv_lens[row] for row in rows],
            tables[rows],
            geometry=geometry,
            implementation="native_cpu",
            num_tokens=len(rows),
            num_rows=len(rows),
        )
        return np.asarray(paged_attention(queries[np.array(rows)], *pools, metadata, scale=0.125))

    together = attended(list(range(len(kv_lens))))
    for row in range(len(kv_lens)):
        np.testing.assert_array_equal(attended([row])[0], together[row])
    assert len({out.tobytes() for out in together}) == len(kv_lens)


def test_the_library_is_compiled_once_and_kept():
    assert build() == build()
    assert build().parent == cache_folder()


def test_a_machine_without_a_compiler_is_served_by_xla_and_says_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="CXX names 'no-such-compiler', which is not to be found"):
        build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler is installed"):
        build()
    geometry = AttentionGeometry(q_heads=2, kv_heads=1, head_dim=64, block_size=16, dtype="float32")
    script = (
        "import jax\n"
        "from pallas_kernels.paged_attention import AttentionGeometry, choose_implementation\n"
        f"print(choose_implementation(None, {geometry!r}, device=jax.devices()[0]))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('xla', [\"native_cpu: CXX names 'no-such-compiler'")


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'vector.h:1: error: what is this' >&2; exit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UnavailableError, match="could not compile the CPU kernels: vector.h:1: error: what is this"):
        build()
    assert [path for path in cache_folder().iterdir() if path.suffix != ".lock"] == []  # nothing half made stays


def test_a_cache_folder_that_cannot_be_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match="the cache folder .*file/native cannot be written: .*Not a directory"):
        build()


def test_engines_that_start_together_compile_the_library_once(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    compiler = tmp_path / "c++"
    runs = tmp_path / "runs"
    # Slow, and makes an empty library.
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then exit; fi\n'
        f"echo run >> {runs}; sleep 0.3\n"
        'while [ "$1" != -o ]; do shift; done\n'
        ': > "$2"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(lambda _: build(), range(3))
    assert first.exists() and set(others) == {first}
    assert len(runs.read_text().splitlines()) == len(UNITS) + 1  # each unit, and the library of them


def test_every_source_is_in_a_unit():
    assert sorted(name for unit in UNITS for name in unit) == sorted(path.name for path in SOURCES.glob("*.cc"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_in_panels_are_on_the_device_without_a_copy(dtype):
    turned = to_panels(np.ones((40, 6), dtype), 16)
    assert jax.device_put(turned, jax.devices("cpu")[0]).unsafe_buffer_pointer() == turned.ctypes.data


def test_heads_that_are_no_whole_number_of_vectors_are_refused():
    geometry = AttentionGeometry(q_heads=2, kv_heads=1, head_dim=40, block_size=16, dtype="float32")
    chosen, refusals = choose_implementation(None, geometry, device=jax.devices()[0])
    assert chosen == "xla" and "head_dim must be a multiple of 16, got 40" in refusals[0]
