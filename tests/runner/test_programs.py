"""What the compiled step must not do: copy a pool, or compile after ready."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ModelSettings
from jaxserve.parallel.mesh import make_mesh, replicated
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compilation import CompileGuard, compile_all
from jaxserve.runner.loading import open_model
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.program import Program
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import Programs
from tests.checkpoints import save_random_llama

pytestmark = pytest.mark.usefixtures("fused_as_served")

NUM_BLOCKS = 3559  # a number that no other array of the step has
BLOCK_SIZE = 16


def programs_of(folder: Path, dtype: str) -> tuple[Programs, ProgramShapes]:
    files = open_model(ModelSettings(model=str(folder), dtype=dtype))
    backend = choose_backend(files.decoder, dtype=files.dtype, block_size=BLOCK_SIZE, mesh=make_mesh())
    graph = ModelGraph(files.decoder, dtype=files.dtype, backend=backend)
    spec = graph.kv_cache_spec()
    shapes = ProgramShapes(
        buckets=Buckets((2, 128), (2, 16)), kv_spec=spec, num_blocks=NUM_BLOCKS, max_num_seqs=16, max_model_len=256
    )
    return Programs(graph, shapes), shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [2, 128])
def test_the_step_copies_no_pool(tmp_path: Path, dtype: str, num_tokens: int) -> None:
    programs, shapes = programs_of(save_random_llama(tmp_path), dtype)
    compiled = programs.lower_forward(shapes.buckets.pick(num_tokens)).compile()
    pool = rf"(?:{NUM_BLOCKS},{BLOCK_SIZE}|{NUM_BLOCKS * BLOCK_SIZE}),[\d,]*\]"
    text = compiled.as_text()
    assert re.search(pool, text), "the pattern finds the pools at all"
    assert not re.findall(rf"= \w+\[{pool}\S* (?:copy|convert|transpose|concatenate)\(", text)
    pool_bytes = shapes.kv_spec.block_bytes * NUM_BLOCKS
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 4
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_steps_take_their_temporaries_once_and_their_arrays_twice(tmp_path: Path) -> None:
    programs, shapes = programs_of(save_random_llama(tmp_path), "float32")
    logits_bytes = 16 * 320 * 4  # the sampler's temporaries hold them at least once
    table_bytes = math.prod(shapes.tokens_shape) * 4
    hidden_bytes = 128 * 64 * 4
    step_bytes = programs.step_bytes()
    assert step_bytes > logits_bytes + 2 * (table_bytes + hidden_bytes)
    pool_bytes = shapes.kv_spec.block_bytes * NUM_BLOCKS
    assert step_bytes < pool_bytes / 4, "neither pools nor weights count"


def test_the_guard_counts_compiles_only_in_steps_and_while_armed() -> None:
    guard, other = CompileGuard(), CompileGuard()
    double = jax.jit(lambda x: x * 2 + 1)
    with guard.watch():
        double(jnp.ones(3))
    assert guard.num_compiles == 0
    guard.arm()
    other.arm()
    double(jnp.ones(4))  # of another engine, or of the user
    with guard.watch():
        double(jnp.ones(3))
        thread = threading.Thread(target=lambda: double(jnp.ones(6)))
        thread.start()
        thread.join()
    assert guard.num_compiles == 0
    with guard.watch():
        double(jnp.ones(5))
    assert guard.num_compiles >= 1
    assert other.num_compiles == 0
    guard.disarm()
    other.disarm()
    counted = guard.num_compiles
    with guard.watch():
        double(jnp.ones(7))
    assert guard.num_compiles == counted


def of_two_numbers(function: Callable[[jax.Array], jax.Array]) -> Program:
    where = replicated(make_mesh())
    return Program(function=function, arguments=(jax.ShapeDtypeStruct((2,), jnp.float32),), results=where)


def fail(x: jax.Array) -> jax.Array:
    raise ValueError("no such shape")


def test_the_first_error_is_not_kept_waiting_by_other_compiles() -> None:
    go_on = threading.Event()

    def dawdle(x: jax.Array) -> jax.Array:
        go_on.wait(60)
        return x

    begin_s = time.monotonic()
    with pytest.raises(ValueError, match="no such shape"):
        compile_all({"slow": of_two_numbers(dawdle), "bad": of_two_numbers(fail)}, num_threads=2)
    assert time.monotonic() - begin_s < 30
    go_on.set()


def test_the_first_error_ends_the_compilation() -> None:
    with pytest.raises(ValueError, match="no such shape"):
        compile_all({"bad": of_two_numbers(fail), "good": of_two_numbers(lambda x: x)}, num_threads=1)
