"""What makes kernels quick in the Mosaic GPU interpreter."""

import importlib
import threading
from collections.abc import Iterator

import jax
import pytest

from pallas_kernels.paged_attention.mosaic_gpu import merge


@pytest.fixture
def compiled_once(monkeypatch) -> Iterator[None]:
    """For kernels of several warpgroups: without it each of their thread blocks takes seconds."""
    if jax.__version_info__ >= (0, 11):
        yield
        return
    lock, programs = threading.Lock(), {}

    def evaluate(jaxpr, consts, *args):
        jax.core.eval_jaxpr(jaxpr, consts, *args)

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in programs:
                programs[jaxpr] = jax.jit(evaluate, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()
        programs[jaxpr](consts, *args)

    threads = importlib.import_module("jax._src.pallas.mosaic.interpret.thread_map")
    monkeypatch.setattr(threads, "_run_jaxpr", run)
    yield


@pytest.fixture
def few_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges read as many partials at once, unrolled, as head_dim leaves room for: 128 of 8. Two of 8 do as well."""
    monkeypatch.setattr(merge, "_READ_AT_ONCE", 2 * 8 * 8)
