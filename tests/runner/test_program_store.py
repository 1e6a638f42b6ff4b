"""Programs that an earlier start compiled: found untraced, equal in every bit, and never those of something else."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.core import EngineCore
from jaxserve.parallel.mesh import make_mesh, replicated
from jaxserve.runner import program_store
from jaxserve.runner.compilation import compile_all, keep_programs
from jaxserve.runner.program import Program
from jaxserve.runner.program_store import ProgramStore
from tests.checkpoints import save_random_llama
from tests.harness import greedy, run, tiny_config

MESH = make_mesh()


class Traces:
    """A program that counts how often it is traced."""

    def __init__(self, *, factor: float = 2.0, size: int = 8) -> None:
        self.count = 0
        self._factor = factor
        where = replicated(MESH)
        self.program = Program(
            function=self._function,
            arguments=({"x": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)},),
            results=(where, None, [where]),
            donated=(0,),
        )

    def _function(self, inputs: dict[str, jax.Array]) -> tuple[jax.Array, None, list[jax.Array]]:
        self.count += 1
        return inputs["x"] * self._factor, None, [jnp.flip(jnp.sin(inputs["x"]))]


def compiled(traces: Traces, folder: Path, description: str = "scale") -> Any:
    return compile_all({"scale": traces.program}, store=(ProgramStore(folder, MESH), description))["scale"]


def test_a_second_start_traces_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first, second = Traces(), Traces()
    x = np.linspace(-3, 3, 8, dtype=np.float32)
    wanted = compiled(first, tmp_path)({"x": jnp.asarray(x)})
    given = jnp.asarray(x)
    answer = compiled(second, tmp_path)({"x": given})
    assert (first.count, second.count) == (1, 0)
    assert jax.tree.structure(answer) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(answer), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert given.is_deleted(), "what is donated is so still"


def test_another_description_is_another_program(tmp_path: Path) -> None:
    compiled(Traces(), tmp_path, "scale")
    other = Traces(factor=3.0)
    result, _, _ = compiled(other, tmp_path, "scale by three")({"x": jnp.ones(8)})
    assert (other.count, result[0]) == (1, 3.0)


def test_changed_sources_are_traced_and_the_same_module_is_not_compiled(tmp_path, monkeypatch, caplog) -> None:
    compiled(Traces(), tmp_path)
    monkeypatch.setattr(program_store, "digest_of_sources", lambda: "of other sources")
    same, changed = Traces(), Traces(factor=5.0)
    programs = set(tmp_path.glob("program-*"))
    compiled(same, tmp_path)
    assert same.count == 1
    assert set(tmp_path.glob("program-*")) == programs
    monkeypatch.setattr(program_store, "digest_of_sources", lambda: "of yet others")
    result, _, _ = compiled(changed, tmp_path)({"x": jnp.ones(8)})
    assert (changed.count, result[0]) == (1, 5.0)
    assert len(list(tmp_path.glob("program-*"))) == 2


def test_every_file_of_the_packages_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(program_store.pallas_kernels, "__path__", [str(tmp_path)])
    seen = {program_store.digest_of_sources()}
    for name, text in (("op.py", "a"), ("op.py", "b"), ("kernel.cc", "b"), ("tuned/op.json", "b"), ("tuned/c.h", "")):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (0, 0))
        seen.add(program_store.digest_of_sources())
    assert len(seen) == 6
    assert program_store.digest_of_sources() in seen


def test_sources_that_change_while_the_process_runs_are_like_no_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(program_store.pallas_kernels, "__path__", [str(tmp_path)])
    (tmp_path / "op.py").write_text("a")
    assert program_store.digest_of_sources() != program_store.digest_of_sources()


def test_settings_of_jax_and_of_the_compilers_are_part_of_an_entrys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {program_store.environment(MESH), program_store.environment(make_mesh(2))}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    seen.add(program_store.environment(MESH))
    monkeypatch.setattr(program_store, "processor", lambda: "another processor")
    seen.add(program_store.environment(MESH))
    with jax.default_matmul_precision("highest"):
        seen.add(program_store.environment(MESH))
    assert len(seen) == 5


@pytest.mark.parametrize("damage", [lambda entry: entry[:-7], lambda entry: b"", lambda entry: entry[:-1] + b"!"])
def test_a_damaged_entry_is_compiled_again_with_a_warning(tmp_path: Path, caplog, damage: Any) -> None:
    compiled(Traces(), tmp_path)
    (path,) = tmp_path.glob("program-*")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again, third = Traces(), Traces()
    result, _, _ = compiled(again, tmp_path)({"x": jnp.ones(8)})
    assert (again.count, result[0]) == (1, 2.0)
    assert f"{path} cannot be read: it is damaged" in caplog.text
    compiled(third, tmp_path)
    assert third.count == 0, "what was compiled again is kept"


def test_a_damaged_name_leads_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled(Traces(), tmp_path)
    (link,) = tmp_path.glob("untraced-*")
    link.write_text("../../etc/passwd")
    again = Traces()
    compiled(again, tmp_path)
    assert again.count == 1
    assert "is damaged" in caplog.text


def test_what_cannot_be_kept_is_compiled_and_said_once(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(program: object) -> None:
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(program_store.serialize_executable, "serialize", refuse)
    store = ProgramStore(tmp_path, MESH)
    jobs = {size: Traces(size=size).program for size in (2, 3)}
    programs = compile_all(jobs, store=(store, "scale"))
    assert programs[3]({"x": jnp.ones(3)})[0][0] == 2.0
    assert caplog.text.count("programs are not kept for the next start") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_no_start_used_for_a_month_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = ("program-old", "untraced-old", "partial-old", "a-users-file", "program-new")
    long_ago_s = time.time() - (program_store.KEPT_DAYS + 1) * 24 * 3600
    for name in names:
        (tmp_path / name).touch()
        if name != "program-new":
            os.utime(tmp_path / name, (long_ago_s, long_ago_s))
    ProgramStore(tmp_path, MESH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-users-file", "program-new"]


def test_where_jax_keeps_programs_itself_nothing_else_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    try:
        assert keep_programs(tmp_path, MESH) is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "traced at every start" in caplog.text


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "data_parallel_size": 2}])
def test_an_engines_second_start_compiles_nothing_and_answers_alike(tmp_path: Path, caplog, sizes: dict) -> None:
    caplog.set_level(logging.INFO)
    checkpoint = save_random_llama(tmp_path / "model")
    config = tiny_config(
        str(checkpoint), compilation_cache_dir=str(tmp_path / "programs"), token_buckets=(64,), **sizes
    )
    prompts = [list(range(3, 43)), list(range(9, 20)), [7]]
    params = [greedy(12, logprobs=2), greedy(9, prompt_logprobs=1), greedy(20, temperature=0.8, seed=3)]
    answers, kept = [], []
    for _ in range(2):
        caplog.clear()
        core = EngineCore(config)
        deltas = run(core, prompts, params)
        answers.append([(d.token_ids, d.logprobs, d.prompt_logprobs) for request in deltas for d in request])
        core.shutdown()
        assert "compiled a program after ready" not in caplog.text
        kept.append([record.args for record in caplog.records if "were kept" in record.msg])
    num_programs = kept[0][0][1]
    assert kept == [[(0, num_programs)], [(num_programs, num_programs)]]
    assert answers[0] == answers[1]
